"""What users see: tables fit the screen, keep every figure, and leave paths and commands whole."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finhpc
from finhpc.commands.decompose import spectra
from finhpc.commands.evaluate import report as evaluate_report
from finhpc.commands.export import _summary as export_summary
from finhpc.commands.prepare import _summary as prepare_summary
from finhpc.commands.sweep import report as sweep_report
from finhpc.screen import Progress, duration, rows_table, summary_table
from finhpc.settings.base import build
from finhpc.settings.sweep import SweepConfig

LONG = "/home/someone/projects/finance/models/2026-11-pretrained-low-rank-16"


def test_progress_estimates_the_time_left_once_it_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    progress = Progress("tokenizing", 1000, "units")
    for done in range(1, 12):
        clock += 12.0
        progress.advance(1)
        left = ", 3:17:48 left" if done == 11 else ", 3:18:00 left" if done == 10 else ""
        line = f"tokenizing: {done / 1000:.0%} of 1000 units, 0.1 units/s{left}\n"
        assert capsys.readouterr().err == line
    sized = Progress("packing", 4_000_000)
    clock += 12.0
    sized.advance(2_000_000)
    assert capsys.readouterr().err == "packing: 50% of 4 MB, 0.2 MB/s\n", "one file may have been packed with others"


def test_summary_table() -> None:
    screen = io.StringIO()
    summary_table("Run demo", [("val_loss", "5.1"), ("open", "finhpc ui [port]")], screen)
    assert "Run demo" in screen.getvalue()
    assert "finhpc ui [port]" in screen.getvalue()


def test_a_wide_table_in_a_file_keeps_every_figure() -> None:
    screen = io.StringIO()
    rows_table("wide", [{f"column {i}": f"{12_318_720 + i:,}" for i in range(9)}], screen)
    assert all(f"12,318,72{i}" in screen.getvalue() for i in range(9))


def test_what_is_to_be_copied_is_never_broken() -> None:
    screen = io.StringIO()
    path, command = f"/{'long/' * 50}model", f"finhpc ui --run.storage /{'long/' * 50}"
    summary_table("Run demo", [("model", path), ("open", command), ("words", "many words " * 20)], screen)
    assert screen.getvalue().splitlines()[-2:] == [f"model: {path}", f"open: {command}"]


def test_a_path_is_printed_as_a_shell_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "my runs" / "model"
    path.mkdir(parents=True)
    screen = io.StringIO()
    summary_table("run", [("model", str(path)), ("base", f"{path}, 12 M parameters")], screen)
    assert f"'{path}'" in screen.getvalue()
    assert f" {path}, 12 M" in screen.getvalue(), "words that begin with a path are no path"


def test_a_table_too_wide_for_the_screen_continues_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    screen = io.StringIO()
    rows = [
        {"trial": f"rank={rank},lr=0.001", "status": "finished and scored by the sweep", "model": f"{LONG}/{rank}"}
        | {f"figure {i}": f"{rank}{12_318_720 + i:,}" for i in range(9)}
        for rank in (8, 16)
    ]
    rows_table("wide", rows, screen)
    text = screen.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines[:-2])) <= 80
    assert all(f"{rank}12,318,72{i}" in text for rank in (8, 16) for i in range(9))
    assert lines[-2:] == [f"rank={rank},lr=0.001, model: {LONG}/{rank}" for rank in (8, 16)]
    assert text.count("rank=16,lr=0.001") >= 3, "every part names its rows"


def test_every_part_of_a_wide_table_tells_its_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    screen = io.StringIO()
    rows = [
        {"stages": 1 + i // 2, "replicas": 4 - i % 2} | {f"f{j}": "1,234,567,890" for j in range(6)} for i in range(4)
    ]
    rows_table("topologies", rows, screen)
    heads = re.findall(r"│ +(\d) │ +(\d) │", screen.getvalue())
    assert len(heads) > 4
    assert set(heads) == {("1", "4"), ("1", "3"), ("2", "4"), ("2", "3")}


def a_decomposition() -> dict[str, Any]:
    layers = [
        {
            "name": f"model.layers.{block}.self_attn.{name}_proj", "kind": "attention", "out_features": 4096,
            "in_features": 11008, "blocks": 1, "rank": 128 + block, "error": 0.123 + block,
            "error_over_optimal": 1.000001 + block,
        }
        for block in range(32) for name in "qkvo"
    ]  # fmt: skip
    sizes = {"params_total": 3.2e9, "params_dense": 6.7e9, "compression_ratio": 2.1, "linear_params_kept": 0.41}
    about = {"source": LONG, "model": f"{LONG}-decomposed", "wall_s": 1234.5, "peak_memory_bytes": [12_345_678_901]}
    return {"layers": layers, **sizes, **about}


def an_evaluation() -> dict[str, Any]:
    scores = {
        "weighted_f1": 0.7123, "acc": 0.7345, "ci95": {"weighted_f1": [0.7012, 0.7234], "acc": [0.72, 0.75]},
        "majority": {"weighted_f1": 0.4512, "acc": 0.5923}, "random": {"acc": 0.3333},
        "examples": 12345, "unread": 12, "cut": 1234, "tied": 7,
    }  # fmt: skip
    names = [f"2026-11-{method}-llama-1b-rank-16" for method in ("dense", "low-rank", "blend")]
    models = [{"name": name, "scores": {"fpb": scores, "my_own_task": scores}} for name in names]
    return {"tasks": ["fpb", "my_own_task"], "models": models}


def a_preparation() -> dict[str, Any]:
    counts = {"documents": 8_013_769, "documents_val": 8_021, "tokens": 9_035_582_489, "tokens_val": 9_036_000}
    rest = {"bytes": 39_769_491_688, "vocab_size": 50257, "val_unigram_entropy_nats": 7.8, "shards": 1301}
    speed = {"shard_bytes": 18_071_164_978, "wall_s": 5321.0, "tokens_per_s": 1_698_100.0}
    return {"out": LONG, "dropped": {"duplicate": 1234, "empty": 12, "tail_tokens": 1023}, **counts, **rest, **speed}


def an_export() -> dict[str, Any]:
    names = [f"model.layers.{block}.self_attn.q_proj" for block in range(6)]
    sizes = {"params_total": 3.2e9, "params_dense": 6.7e9, "size_bytes": 1_234_567_890, "size_ratio": 10.9}
    form = {"format": "native", "bits": 4, "scheme": "minmax", "dtype": "float32", "not_quantised": names}
    return {"status": "finished", "out": LONG, "wall_s": 12.3, **sizes, **form}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 s"), (0.0314, "0.031 s"), (12.4, "12 s"), (60.0, "0:01:00"), (3723.4, "1:02:03")]
)
def test_durations_below_a_minute_are_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def a_sweep() -> dict[str, Any]:
    figures = dict.fromkeys(sweep_report.SHOWN, 12345678.9)
    trials = [
        {"place": i, "trial": f"method=low_rank,rank={8 * i},bits=4,seed={i}", "status": "finished", **figures}
        | {"error": None, "scored_only": False}
        for i in range(1, 4)
    ]
    about = {"model": f"{LONG}/model", "registered": "low-rank version 3", "folder": LONG, "steps_trained": 30_000}
    return {"trials": trials, "best": trials[0], "wall_s": 7200.0, **about}


@pytest.mark.parametrize(
    "show",
    [
        lambda: spectra.summary(a_decomposition()),
        lambda: evaluate_report.summary(an_evaluation()),
        lambda: prepare_summary(a_preparation()),
        lambda: export_summary(an_export()),
        lambda: sweep_report.show(build(SweepConfig, {"run": {"name": "ranks", "storage": LONG}}), a_sweep()),
    ],
    ids=["decompose", "evaluate", "prepare", "export", "sweep"],
)
def test_tables_of_commands_fit_80_columns(
    show: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show()
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("│")]) > 3
    assert not [line for line in lines if line[:1] in "┏┡│┌└" and len(line) > 80]
    for line in lines:
        assert "…" not in line
        if LONG in line and "from_pretrained" not in line:
            assert re.fullmatch(rf"[\w ]+: (finhpc ui .*)?{LONG}\S*( .*)?", line), "a path stands on a line of its own"


@pytest.mark.slow
def test_tables_of_an_estimate_fit_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    finhpc.estimate(config="gpt2-127m-r96")
    lines = [line for line in capsys.readouterr().err.splitlines() if line[:1] in "┏┃┡│└┌"]
    assert len(lines) > 60
    assert max(map(len, lines)) <= 80
