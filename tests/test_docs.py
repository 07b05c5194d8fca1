"""Every command, Python block and name in README.md and docs/: read as it stands, and run if it can be run here.

Pages are run as a reader would: in one folder, in the order README, tutorial, commands, and so on. A fenced block with
a title is a file of that name; a Python block without one is executed; `bash` blocks hold commands.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finhpc.cli import main
from finhpc.commands import COMMANDS
from tests.evaluation.tasks import write_data
from tests.models.dense import saved, tiny_llama
from tests.tiny import WORDS, tiny_shards, with_tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ORDER = ["README.md", "docs/tutorial.md", "docs/commands/pretrain.md"]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")], key=lambda page: (
    ORDER.index(name) if (name := str(page.relative_to(ROOT))) in ORDER else len(ORDER), name
))  # fmt: skip
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
NAMES = [name for name in COMMANDS if " " not in name]
FOREIGN = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//[^\s>]*"
    r"|<link[^>]*rel=\"?(?:stylesheet|preconnect)\"?[^>]*href=\"?(?:https?:)?//[^\s>]*"
)
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(page, *match.groups(default="")) for match in FENCE.finditer(page.read_text(encoding="utf-8"))]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a `bash` block: continued lines joined, comments dropped, `;` and `&&` split."""
    for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in (";", "&&"):
                words.append(word)
            elif words:
                yield words
                words = []


ALL = [block for page in PAGES for block in blocks(page)]
EVERY = [(block.page, words) for block in ALL for words in commands(block)]
FINHPC = list(dict.fromkeys(tuple(words[1:]) for _, words in EVERY if words[0] == "finhpc"))
OTHERS = [words for _, words in EVERY if words[0] != "finhpc"]


@pytest.fixture(scope="module")
def titled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages show."""
    folder = tmp_path_factory.mktemp("titled")
    for block in ALL:
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
    return folder


# -- what is written ------------------------------------------------------------------------


def test_every_command_has_a_page_and_an_example_in_the_readme() -> None:
    assert {page.stem for page in (DOCS / "commands").glob("*.md")} - {"index"} == set(NAMES)
    for name in NAMES:
        page = DOCS / "commands" / f"{name}.md"
        for text in (page, ROOT / "README.md"):
            assert any(where == text and words[:2] == ["finhpc", name] for where, words in EVERY), (name, text)
        for section in ("## Errors and remedies", "<!-- finhpc settings ") if name != "bench" else ():
            assert section in page.read_text(encoding="utf-8"), (name, section)


@pytest.mark.parametrize("words", FINHPC, ids=" ".join)
def test_its_settings_are_settings(
    words: tuple[str, ...], titled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(titled)
    if "--plugins" in words:  # what a plugin registers would stay; the slow test imports it
        at = words.index("--plugins")
        words = (*words[:at], *words[at + 2 :])
    assert main([*words, "--print_config"]) == 0, capsys.readouterr().err


def test_the_other_commands_name_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of Ray, make and the shell, which other tests run."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    calls = (DOCS / "commands" / "serve.md").read_text(encoding="utf-8")
    for words in OTHERS:
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        match words:
            case ["make", target]:
                assert target in targets
            case ["ray", "job", "submit", *rest]:
                _, script, *settings = rest[rest.index("--") + 1 :]
                assert (ROOT / script).is_file()
                assert main([Path(script).stem, *settings, "--print_config"]) == 0, capsys.readouterr().err
            case ["sbatch", script, *finhpc_words]:
                assert (ROOT / script).is_file()
                assert main([*finhpc_words, "--print_config"]) == 0, capsys.readouterr().err
            case ["python", "-m", module, *_]:
                import_module(module)
            case ["cluster/start.sh", *_] | ["ray" | "kubectl" | "docker", *_]:
                files = [word for word in words if word.startswith("cluster/")]
                assert all((ROOT / file).is_file() for file in files), files
            case ["curl", address, *_] if address.startswith("http://127.0.0.1:8000/"):
                assert f"`POST {address.partition('8000')[2]}`" in calls or "/v1/models" in address
            case ["export" | "source" | "umask" | "mkdir" | "openssl" | "chmod" | "pip", *_]:
                pass
            case _:
                pytest.fail(f"no test knows {words}")


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=lambda b: f"{b.page.stem} {b.title}")
def test_python_imports_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("finhpc"):
            for alias in node.names:
                assert resolves(f"{node.module}.{alias.name}"), f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("finhpc") or resolves(alias.name), alias.name


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_and_files_in_the_text_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for dotted in re.findall(r"`(?:python -m )?((?:finhpc|tests)(?:\.\w+)+)[` (]", text):
        assert resolves(dotted), dotted
    for path in re.findall(r"`((?:finhpc|tests|docs|cluster|jobs)/[\w./-]*)`", text):
        assert (ROOT / path).exists() or path == "docs/site", path
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def test_the_short_ones_are_short() -> None:
    for name, most in (("README.md", 200), ("CONTRIBUTING.md", 60)):
        assert len((ROOT / name).read_text().splitlines()) <= most, name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_output(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


# -- what is run ----------------------------------------------------------------------------

# Flags that make a command small enough for a test, by its first words; the longest start that fits counts.
STEPS = "--train.steps 2 --data.eval_samples 8"
TINY = f"{STEPS} --model.layers 2 --model.width 64 --model.heads 2"
SMALLER = {
    "prepare": "--val_fraction 0.2 --block_len 256",
    "prepare --source docs": "--dry_run",
    "prepare --source news/*.jsonl --source filings/ --tokenizer train:4096": (
        "--val_fraction 0.2 --block_len 256 --tokenizer train:300"
    ),
    "pretrain": f"{TINY} --method.rank 8",
    "pretrain --data.shards base-shards": f"{STEPS} --method.rank 8",
    "pretrain --model.path": STEPS,
    "study": "--dry_run",
    "sweep": f"{TINY} --data.seq_len 64 --grid method.rank=[4,8]",
    "sweep finetune": "--train.steps 2",
    "reproduce": "--dry_run",  # tests/commands/test_reproduce_job.py runs it
    "decompose": "--calibration.samples 4 --calibration.seq_len 32",
    "finetune": "--train.steps 2",
    "evaluate": "--limit 4 --bootstrap 20",
}
NOT_RUN = ("ui", "serve", "bench")  # servers; minutes each (tests/bench runs them small)


def smaller(words: tuple[str, ...]) -> list[str]:
    """The words as a shell gives them, with `SMALLER`'s flags; dry runs stay as they are."""
    expanded = [path for word in words for path in (sorted(glob(word)) if "/*." in word else [word])]
    starts = [start for start in SMALLER if " ".join(words).startswith(start)]
    quick = {"--dry_run", "--list_templates", "--help", "--print_config"} & set(words)
    return expanded if quick or not starts else [*expanded, *shlex.split(SMALLER[max(starts, key=len)])]


def finhpc(words: list[str], folder: Path, *, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command, or Python code, in a new process that works in `folder`."""
    start = ["-c", code] if code else ["-P", "-m", "finhpc", *words]
    return subprocess.run([sys.executable, *start], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages' commands name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("news", "filings"):
        (tmp_path / folder).mkdir()
    lines = [
        json.dumps({"text": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(300)) + str(i)}) for i in range(60)
    ]
    (tmp_path / "news" / "one.jsonl").write_text("\n".join(lines[:30]))
    (tmp_path / "news" / "two.jsonl").write_text("\n".join(lines[30:]))
    (tmp_path / "filings" / "ten-k.txt").write_text("The company has risks. " * 50)
    shards = tiny_shards(tmp_path / "of-the-base")
    for name in ("BASE", "FOLDER"):
        with_tokenizer(saved(tiny_llama(context=512), tmp_path / name), shards)
    data = write_data(tmp_path / "DATA", 40)
    for name, file in {"fpb.txt": "fpb.txt", "tfns.csv": "tfns.csv",
                       "fiqa.json": "fiqa.json", "held-out.txt": "fpb.txt"}.items():  # fmt: skip
        (tmp_path / name).write_bytes((data / file).read_bytes())
    for general in data.glob("*.jsonl"):
        (tmp_path / "FOLDER" / general.name).write_bytes(general.read_bytes())
    rows = [{"prompt": "The bank", "adapter": "news"}, {"prompt": "The rate"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


class Reader:
    """Runs pages in a folder; collects the results' keys by command, and what failed."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.capfd, self.monkeypatch = folder, capfd, monkeypatch
        self.done: set[tuple[str, ...]] = set()
        self.keys: dict[str, set[str]] = {}
        self.failed: list[str] = []

    def read(self, page: Path) -> None:
        for block in blocks(page):
            if block.title:
                (self.folder / block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                self._python(block)
            for words in commands(block):
                if words[0] == "finhpc" and words[1] not in NOT_RUN and tuple(words) not in self.done:
                    self.done.add(tuple(words))
                    self._command(tuple(words[1:]))

    def _python(self, block: Block) -> None:
        try:
            exec(compile(block.text, str(block.page), "exec"), {"__name__": "page"})
        except Exception as error:
            self.failed.append(f"{block.page}: {error!r}\n{block.text}")

    def _command(self, words: tuple[str, ...]) -> None:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("The bank\n"))
        given = [*smaller(words), "--json"]
        if "--plugins" in words:
            done = finhpc(given, self.folder)
            code, out, err = str(done.returncode or ""), done.stdout, done.stderr
        else:
            self.capfd.readouterr()
            try:
                code = str(main(given) or "")
            except Exception as error:  # the other commands are worth a try
                code = repr(error)
            out, err = self.capfd.readouterr()
        if code:
            self.failed.append(f"finhpc {shlex.join(given)}: {code}\n{err[-1500:]}")
        elif out.rstrip().endswith("}"):
            keys = json.loads(out.splitlines()[-1])
            self.keys.setdefault(words[0], set()).update(keys)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_newcomers_path(
    newcomer: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """README first, then every page; the result keys that a command's page lists are in the results."""
    reader = Reader(newcomer, capfd, monkeypatch)
    for page in PAGES:
        if page.name not in ("extending.md", "CONTRIBUTING.md"):
            reader.read(page)
    assert not reader.failed, "\n\n".join(reader.failed)
    for left in ("shards/manifest.json", "runs/first/model", "runs/ranks/trials.csv", "report/report.html", "low-rank",
                 "first-merged", "first-4bit", "runs/sentiment/model", "runs/compare/result.json",
                 "answers.jsonl"):  # fmt: skip
        assert (newcomer / left).exists(), left
    missing = [
        f"{name}: {key}" for name in NAMES if name in reader.keys for key in documented(name) - reader.keys[name]
    ]
    assert not missing, missing


def documented(name: str) -> set[str]:
    """The keys in the table `key` of a command's page; a dry run's page has none that only a run gives."""
    text = (DOCS / "commands" / f"{name}.md").read_text(encoding="utf-8").partition("| key | meaning |")[2]
    rows = text.partition("\n\n")[0].splitlines()[2:]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}


@pytest.mark.slow
def test_the_examples_of_extending_work(newcomer: Path) -> None:
    """Each in processes of its own, since what they register stays."""
    tiny_shards(Path("shards"))
    page = blocks(DOCS / "extending.md")
    for block in page:
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
    for block in page:
        runs = [finhpc(words[1:], newcomer) for words in commands(block)]
        if block.language == "python" and not block.title:
            runs.append(finhpc([], newcomer, code=block.text))
        for done in runs:
            assert done.returncode == 0, f"{block.text}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_make_docs_refuses_broken_links_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not FOREIGN.findall(text), page
        assert "<!-- finhpc " not in text, page


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
