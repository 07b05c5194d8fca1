"""The whole report: the page and its files, and everything it may be given that is wrong."""

from __future__ import annotations

import csv
import json
import re
import socket
import sqlite3
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import finhpc
from finhpc.cli import main
from finhpc.commands.report import store as store_module
from finhpc.commands.report.command import report
from finhpc.commands.ui import serving
from finhpc.errors import ConfigError, FinhpcError
from finhpc.settings.base import build
from finhpc.settings.report import ReportConfig
from tests.commands.report.store import Store


class Cells(HTMLParser):
    """Every table's rows as lists of texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, start: str, nth: int = 0) -> list[str]:
        return [row for row in self.rows if row and row[0].startswith(start)][nth]


def settings(store: Store, out: Path, **more: Any) -> ReportConfig:
    return build(ReportConfig, {"run": {"storage": str(store.folder)}, "out": str(out), **more})


@pytest.fixture(scope="module")
def made(paper_like: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("report") / "of" / "the-paper"
    return out, report(settings(paper_like, out))


def test_the_page_has_ours_and_the_papers_row_below_each_other(made: tuple[Path, dict[str, Any]]) -> None:
    cells = Cells((made[0] / "report.html").read_text())
    at = cells.rows.index(cells.row("gpt2-small-cpu-r96"))
    ours, paper = cells.rows[at : at + 2]
    assert ours[1:] == ["-", "53.0", "-", "7.64 M (7.70 MB)", "-", "0.250", "5.400", "150"]
    assert paper == [
        *("paper: GPT2-127M-r192", "48.1", "57.7", "50.7", "77.5 M (77.5 MB)", "192.4", "121.0", "", ""),
    ]
    dense = cells.row("gpt2-small-cpu 2 seeds")
    assert dense[4:7] == ["13.9 M (-)", "0.500", "0.500 ±0.100"]
    assert (
        "gpt2-small-cpu (6 layers x 384 wide, 13.9 M parameters), 10,240 tokens; 2 workers, on CPU, 1 thread each; "
        "1 to 2 seeds" in (made[0] / "report.html").read_text()
    )
    said = "Examples scored: FPB 150 (most frequent label 30.0, 95 % interval ±5.5). -: not measured."
    assert said in (made[0] / "report.html").read_text()
    base = [row for row in cells.rows if row[0] == "smol"][1]  # of Table IX
    assert base[1:] == ["134.5 M", "-", "-", "-", "-"]
    assert [row for row in cells.rows if row[0] == "paper: Llama2-7B"][1][1:] == [
        *("6.70 B", "112", "184,320", "13.4", "0.21"),
    ]


def test_files_hold_what_the_result_says(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    assert json.loads((out / "result.json").read_text()) == result
    assert result["status"] == "finished"
    assert result["experiments"] == ["tests"]
    assert result["runs"] == {"pretrained": 4, "finetuned": 3, "scored": 0}
    names = {Path(name).name for name in result["files"]}
    assert names == {
        "report.html",
        "result.json",
        *(f"table-{key}.csv" for key in ("vi", "vii", "viii", "ix")),
        *(f"{key}.png" for key in ("figure-6", "figure-7", "quality-size", "quality-time")),
    }
    for name in result["files"]:
        content = Path(name).read_bytes()
        assert not name.endswith(".png") or content.startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "table-ix.csv").open()))
    assert [row["model"] for row in rows if row["model"]] == [row["model"] for row in result["tables"]["ix"][:4]]


def test_the_page_needs_nothing_else(made: tuple[Path, dict[str, Any]]) -> None:
    page = (made[0] / "report.html").read_text()
    assert page.count("<svg") == 4
    for tag, attributes in Cells(page).tags:
        assert tag not in ("script", "link", "img", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    style = re.sub(r"url\(#", "", page)
    assert "@import" not in style
    assert "url(" not in style
    svg = page[page.index("<svg") :]
    assert "method 1, r = 96" in svg
    assert "currentColor" in svg
    assert "#123457" not in page


def test_names_are_text_wherever_they_stand(store: Store, tmp_path: Path) -> None:
    evil = "<script>alert('x') --><u> & $\\frac{1}{2}$"
    losses = {1: 3.0, 2: 2.0, 3: 1.5}
    result = {"params_trainable": 9, "held_out_weighted_f1": 0.5, "size_16bit_bytes": 9, "worker_hours": 1.0}
    store.finetune("tuned", 8, 16, f"/models/{evil}", result=result, train=losses, experiment=evil)
    report(settings(store, tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert not {"script", "u"} & {tag for tag, _ in Cells(page).tags}
    assert page.count("&lt;script&gt;") > 3  # experiment, scale, rows, the titles of figures
    assert re.search(r"<text[^>]*>[^<]*\\frac\{1\}\{2\}", page)  # in a figure it is told as it is, not set as a formula


def test_a_report_is_made_again_in_its_place(paper_like: Store, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    report(settings(paper_like, tmp_path))
    assert "FinGPT-HPC" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_the_verb_prints_its_result_and_a_dry_run_writes_nothing(
    paper_like: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["report", "--run.storage", str(paper_like.folder), "--experiments", "tests"]
    assert main([*words, "--out", str(tmp_path / "out"), "--dry_run", "--json"]) == 0
    out, _ = capfd.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["status"] == "dry_run"
    assert result["tables"]["vi"][0]["params_total"] == 13_890_000
    assert not (tmp_path / "out").exists()
    assert callable(finhpc.report)


def test_every_page_of_a_long_list_is_read(paper_like: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PAGE", 2)
    result = report(settings(paper_like, tmp_path / "out"), dry_run=True)
    assert result["runs"] == {"pretrained": 4, "finetuned": 3, "scored": 0}


@pytest.mark.slow
def test_a_server_tells_the_same_as_its_database(paper_like: Store, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = report(settings(paper_like, tmp_path / "database"))
    with serving(paper_like.uri, port) as (_, address):
        config = build(ReportConfig, {"run": {"tracking_uri": address}, "out": str(tmp_path / "server")})
        served = report(config)
    for key in ("tables", "claims", "runs", "experiments"):
        assert served[key] == told[key]
    for name in ("figure-6.png", "table-viii.csv"):
        assert (tmp_path / "server" / name).read_bytes() == (tmp_path / "database" / name).read_bytes()


# -- bad input ------------------------------------------------------------------------------


def refused(config: ReportConfig, kind: type[FinhpcError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        report(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    config = build(ReportConfig, {"run": {"storage": str(tmp_path)}, "out": str(tmp_path / "out")})
    assert "nothing was tracked there yet" in refused(config)
    assert not list(tmp_path.iterdir())


def test_an_experiment_that_does_not_exist_is_named_with_the_nearest(paper_like: Store, tmp_path: Path) -> None:
    assert refused(settings(paper_like, tmp_path, experiments=["test"])) == (
        "experiments=test does not exist; did you mean 'tests'?"
    )


def test_experiments_without_a_finished_run_are_refused(store: Store, tmp_path: Path) -> None:
    assert "has no finished run" in refused(settings(store, tmp_path))
    store.pretrain("failed", "dense", status="FAILED")
    assert "1 runs that did not finish" in refused(settings(store, tmp_path))


def test_out_that_is_a_file_is_refused(paper_like: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(settings(paper_like, tmp_path / "file"))
    assert "cannot be made" in refused(settings(paper_like, tmp_path / "file" / "below"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_database_of_another_mlflow_is_refused_with_the_way_out(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(store.folder / "mlflow.db") as database:
        database.execute("update alembic_version set version_num = 'c48cb773bb87'")
    database.close()
    said = refused(settings(store, tmp_path))
    assert "written by another version of MLflow" in said
    assert f"`mlflow db upgrade sqlite:///{store.folder}/mlflow.db`" in said


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database at all " * 100)
    config = build(ReportConfig, {"run": {"storage": str(tmp_path)}, "out": str(tmp_path / "out")})
    assert "not a database that MLflow can read" in refused(config)


@pytest.mark.parametrize("silent", [False, True], ids=["refusing", "silent"])
def test_a_server_that_does_not_answer_is_told_in_one_line(
    silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        uri = f"http://me:secret@127.0.0.1:{server.getsockname()[1]}"
        config = build(ReportConfig, {"run": {"tracking_uri": uri}, "out": str(tmp_path / "out")})
        said = refused(config, FinhpcError)
    assert "does not answer" in said
    assert "secret" not in said
