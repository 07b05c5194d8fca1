"""The `docs` source: English documentation of the Python packages installed next to finhpc.

A document is the docstrings of one module, in order, a shipped .rst or .md file, or a package description. The source
needs no download and is the same for the same versions.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from finhpc.data.text.formats import Faults, Unit, file_units
from finhpc.errors import ConfigError, DataError
from finhpc.settings.prepare import PrepareConfig

# Direct and indirect dependencies of finhpc whose docstrings are mostly prose.
DISTRIBUTIONS = (
    "datasets", "huggingface-hub", "matplotlib", "networkx", "numpy", "pandas", "pydantic", "scikit-learn",
    "scipy", "sqlalchemy",
)  # fmt: skip
# Parts of a path that mark tests, code of other projects, generated code and other files without documentation.
SKIPPED = ("test", "vendor", "thirdparty", "third_party", "extern", "generated", "licen", "changelog", "_pb2")
UNIT_BYTES = 2 << 20  # source code parses slowly; small units divide the work evenly
MIN_CHARS = 80  # a shorter docstring says little ("Return the name.")
MIN_DOCUMENT = 200


def docs_units() -> tuple[list[Unit], dict[str, Any]]:
    """Return groups of files of the installed distributions, and a description of these.

    Raises `ConfigError` if none is installed.
    """
    found: list[Unit] = []
    versions: dict[str, str] = {}
    absent: list[str] = []
    for name in DISTRIBUTIONS:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            absent.append(name)
            continue
        versions[name] = package.version
        found += file_units("docs", _files(package), UNIT_BYTES)
    if not found:
        raise ConfigError(
            f"source=docs finds none of {', '.join(absent)} installed; install finhpc with its dependencies."
        )
    return found, {"distributions": versions, "absent": absent, "files": sum(len(unit.paths) for unit in found)}


def read_docs(unit: Unit, config: PrepareConfig, faults: Faults) -> Iterator[str]:
    """Yield the documentation in each file of a unit; a file with too little of it is skipped."""
    for path in map(Path, unit.paths):
        try:
            content = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); install its package again.") from None
        except UnicodeDecodeError:
            continue  # source files may be in other encodings; a few in thousands
        if path.suffix == ".py":
            text = "\n\n".join(_docstrings(content))
        elif path.name == "METADATA":
            text = content.partition("\n\n")[2].strip()
        else:
            text = content.strip()
        if len(text) >= MIN_DOCUMENT and _is_english(text):
            yield text


def _files(package: Distribution) -> list[Path]:
    """Return Python, .rst and .md files and METADATA of a distribution, sorted by their path inside it."""
    chosen = []
    for file in package.files or []:
        named = file.suffix in (".py", ".rst", ".md") or file.name == "METADATA"
        if named and not any(mark in str(file).lower() for mark in SKIPPED):
            chosen.append(file)
    paths = [Path(str(file.locate())) for file in sorted(chosen, key=str)]
    return [path for path in paths if path.is_file()]


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return  # templates and code for other versions of Python
    seen: set[str] = set()
    for raw in _raw_docstrings(tree):
        text = inspect.cleandoc(raw).strip()
        if len(text) >= MIN_CHARS and text not in seen:
            seen.add(text)
            yield text


def _raw_docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield docstrings of a module or class and what it defines, but not of functions inside functions."""
    if (text := ast.get_docstring(node, clean=False)) is not None:
        yield text
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _raw_docstrings(child)


def _is_english(text: str) -> bool:
    """Return whether a text is mostly ASCII and mostly letters: not a table, not another script."""
    ascii_share = len(text.encode("ascii", "ignore")) / len(text)
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    return ascii_share > 0.97 and letters / len(text) > 0.7
