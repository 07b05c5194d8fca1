"""The package's shape, as far as a machine can check it: small folders, files and functions, typed parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
FILES_OF_PRETRAINING, LINES_OF_PRETRAINING = 118, 16_500  # that `finhpc pretrain` imports, directly or not
FILES_PER_FOLDER, LINES_PER_FILE, LINES_PER_FUNCTION, LINES_PER_JOB = 15, 400, 60, 15
SOURCES = sorted((ROOT / "finhpc").rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Each function of a file with its place, `file:line name`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def length(function: Function) -> int:
    """Lines of the body: the signature and the docstring are free."""
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


def untyped(function: Function) -> list[str]:
    """Parameters without an annotation, except a method's first."""
    named = [*function.args.posonlyargs, *function.args.args]
    rest = [function.args.vararg, function.args.kwarg]
    parameters = [*named, *function.args.kwonlyargs, *(parameter for parameter in rest if parameter)]
    first = {"self", "cls"} if named else set()
    return [p.arg for p in parameters if p.annotation is None and not (p is named[0] and p.arg in first)]


def test_folders_are_small() -> None:
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in {p.parent for p in SOURCES}}
    assert not {folder: n for folder, n in counts.items() if n > FILES_PER_FOLDER}


def test_files_are_short() -> None:
    counts = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {path: n for path, n in counts.items() if n > LINES_PER_FILE}


def test_functions_are_short() -> None:
    long = [(place, n) for path in SOURCES for place, f in functions(path) if (n := length(f)) > LINES_PER_FUNCTION]
    assert not long


def test_every_parameter_has_a_type() -> None:
    assert not [(place, names) for path in SOURCES for place, f in functions(path) if (names := untyped(f))]


def test_pretraining_stands_alone() -> None:
    """What a reader of the command must have at hand; finetuning and evaluation give the trainer what only they use."""
    graph = grimp.build_graph("finhpc", exclude_type_checking_imports=True)
    modules = graph.find_upstream_modules("finhpc.commands.pretrain") | {"finhpc.commands.pretrain"}
    assert not [name for name in modules if name.startswith(("finhpc.models.lora.adapter", "finhpc.data.examples"))]
    paths = [ROOT / f"{name.replace('.', '/')}.py" for name in modules]
    files = [path if path.is_file() else path.with_suffix("") / "__init__.py" for path in paths]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert len(files) <= FILES_OF_PRETRAINING
    assert lines <= LINES_OF_PRETRAINING


def test_jobs_hold_no_logic_and_cluster_holds_no_python() -> None:
    assert not list((ROOT / "cluster").rglob("*.py"))
    lengths = {job.name: len(job.read_text(encoding="utf-8").splitlines()) for job in (ROOT / "jobs").glob("*.py")}
    assert not {name: n for name, n in lengths.items() if n >= LINES_PER_JOB}, "a job only calls its command"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(a, *b, c: int, **d): ...", ["a", "b", "d"]),
        ("class C:\n def f(self, a: int, *b: str): ...", []),
        ("def f(a: int, self): ...", ["self"]),
    ],
)
def test_what_counts_as_a_parameter_without_a_type(source: str, names: list[str]) -> None:
    (function,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))
    assert untyped(function) == names
