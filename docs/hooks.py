"""Fills the pages with what the code knows: settings, commands, recipes, messages and the package's own description.

A line `<!-- finhpc NAME ARGUMENTS -->` in a page is replaced by the Markdown that the function NAME of `INSERTS`
returns. The documentation therefore cannot disagree with the code about a setting, its default or its description.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import finhpc
from finhpc import cli
from finhpc.commands import COMMANDS
from finhpc.settings.base import defaults, keys, marked, recipes

LINE = re.compile(r"^<!-- finhpc (\w+) ?(.*?) -->$", re.MULTILINE)
DOCS = Path(__file__).parent


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in one page; mkdocs calls this for each."""
    return LINE.sub(lambda match: INSERTS[match[1]](match[2]), markdown)


def settings_tables(name: str) -> str:
    """Return a table per section of a command's settings: key, default, description."""
    cls = COMMANDS[name].settings_class()
    fields, values = keys(cls), defaults(cls)
    sections: dict[str, list[str]] = {}
    for key, field in fields.items():
        section = key.partition(".")[0] if "." in key else ""
        row = f"| `{key}` | {_cell(values[key])} | {_cell(field.description or '')} |"
        sections.setdefault(section, []).append(row)
    tables = ["| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows) for rows in sections.values()]
    return '<div class="settings" markdown>\n\n' + "\n\n".join(tables) + "\n\n</div>"


def may_change(name: str) -> str:
    """Return the settings of a command that may differ when a run is resumed; `section.*` for a whole section."""
    cls = COMMANDS[name].settings_class()
    every, free = list(keys(cls)), set(marked(cls, "may_change"))
    sections = {key.rpartition(".")[0] for key in every}
    whole = {part for part in sections if part and all(key in free for key in every if key.startswith(f"{part}."))}
    names = dict.fromkeys(
        f"{part}.*" if (part := key.rpartition(".")[0]) in whole else key for key in every if key in free
    )
    return "\n".join(f"- `{name}`" for name in names)


def commands_table(_: str) -> str:
    """Return a table of all commands."""
    rows = [f"| [`{name}`]({name}.md) | {_cell(row.help)} |" for name, row in COMMANDS.items() if " " not in name]
    return "| command | purpose |\n|---|---|\n" + "\n".join(rows)


def recipes_list(prefix: str) -> str:
    """Return the recipes whose names start with `prefix`, as a list."""
    paths = {name: path for name, path in recipes().items() if name.startswith(prefix)}
    return "\n".join(f"- `{name}`: {_first_comment(path)}".rstrip(": ") for name, path in paths.items())


def presets_list(_: str) -> str:
    """Return the names of the model shapes."""
    from finhpc.models.families.presets import PRESETS

    return ", ".join(f"`{name}`" for name in PRESETS) + "."


def output(words: str) -> str:
    """Run a command that neither trains nor writes, such as one that is refused; return its words and its output."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        cli.main(shlex.split(words))
    return f"```console\n$ finhpc {words}\n{out.getvalue().rstrip()}\n```"


def packages(_: str) -> str:
    """Return the list of packages from the docstring of `finhpc`."""
    lines = [line for line in (finhpc.__doc__ or "").splitlines() if line.startswith("- `")]
    return "\n".join(re.sub(r"`\s{2,}", "`: ", line, count=1) for line in lines)


def notebook(name: str) -> str:
    """Return the cells of a notebook as Markdown."""
    cells = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = []
    for cell in cells:
        text = "".join(cell["source"])
        texts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else re.sub(r"^#", "##", text))
    return "\n\n".join(texts)


def api(part: str) -> str:
    """Return mkdocstrings' blocks for one part of the Python API."""
    if part in ("commands", "models"):
        paths = {name: row.function for name, row in COMMANDS.items() if " " not in name and row.function}
        shown = paths if part == "commands" else {"load_model": f"{finhpc.load_model.__module__}:load_model"}
        return "\n\n".join(
            f"::: {path.replace(':', '.')}\n    options:\n      heading: finhpc.{name}\n      toc_label: {name}"
            for name, path in shown.items()
        )
    if part == "settings":
        classes = [getattr(finhpc, name) for name in sorted(finhpc.__all__) if name.endswith("Config")]
        rows = [f"| `finhpc.{cls.__name__}` | {_cell((cls.__doc__ or '').splitlines()[0])} |" for cls in classes]
        return "| class | meaning |\n|---|---|\n" + "\n".join(rows)
    return "\n\n".join(f"::: {name}" for name in (["finhpc.errors"] if part == "errors" else BLOCKS))


def _first_comment(path: Path) -> str:
    """Return the first sentence of the comment at the top of a recipe."""
    lines = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return re.split(r"(?<=\.)\s|;", " ".join(lines))[0].rstrip(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


# The modules whose classes and functions others build on.
BLOCKS = [
    "finhpc.lowrank.layers",
    "finhpc.quantization.per_vector",
    "finhpc.plugins",
]

INSERTS: dict[str, Callable[[str], str]] = {
    "settings": settings_tables,
    "commands": commands_table,
    "may_change": may_change,
    "recipes": recipes_list,
    "presets": presets_list,
    "output": output,
    "packages": packages,
    "notebook": notebook,
    "api": api,
}
