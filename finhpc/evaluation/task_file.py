"""Read another person's task file as data: nothing in it may run code.

lm-eval runs code from a task file in many ways: tags that name functions, classes, metrics that a hub delivers as
scripts, templates that reach Python's modules. So the file is parsed here, by a parser that knows only YAML's own
tags, merged with what it includes, and compared with a list of what is known to be harmless. lm-eval gets the result,
never the file. Templates are rendered in jinja's sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finhpc.errors import ConfigError

CORE = {
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
}
MOST_NODES = 100_000  # of a file once its aliases are written out
LONGEST_PRODUCT = 1_000_000  # items of a text or list that a template multiplies
TEMPLATES = (
    "doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix", "doc_to_decontamination_query",
    "fewshot_delimiter", "target_delimiter",
)  # fmt: skip
PLAIN = {
    *TEMPLATES, "task", "task_alias", "tag", "group", "group_alias", "dataset_path", "dataset_name", "dataset_kwargs",
    "training_split", "validation_split", "test_split", "fewshot_split", "fewshot_config", "generation_kwargs",
    "num_fewshot", "metric_list", "filter_list", "output_type", "repeats", "should_decontaminate", "metadata",
}  # fmt: skip
OF_FEWSHOT = {*TEMPLATES, "sampler", "split", "fewshot_indices", "samples"}
OF_DATASET = {
    "data_files", "data_dir", "field", "revision", "encoding", "delimiter", "sep", "names", "column_names", "header",
    "quotechar", "skiprows",
}  # fmt: skip
READERS = {"json", "csv", "parquet", "arrow", "text"}  # of `datasets`: those that only read
ADDRESSES = ("http://", "https://", "hf://")
TRUST = "read it, then give --trust_task_code true, or write the task without it"


def read_task(path: Path) -> dict[str, Any]:
    """Return a task file merged with the files it includes, as lm-eval merges them, without any code.

    Raises one `ConfigError` with everything that is not known to be harmless, and its place.
    """
    tree = _merged(path, ())
    problems = list(_problems(tree))
    if problems:
        raise ConfigError(
            [f"tasks={path}: {problem}, which could run code on this machine; {TRUST}." for problem in problems]
        )
    return tree


# -- one file -------------------------------------------------------------------------------


def _merged(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    path = path.expanduser().resolve()
    if path in including:
        raise ConfigError(f"tasks: {path} includes itself; remove that include.")
    if not path.is_file():
        raise ConfigError(f"tasks: the included file {path} does not exist; restore it.")
    tree = _parsed(path)
    included = tree.pop("include", None)
    names = included if isinstance(included, list) else [included] if included is not None else []
    merged: dict[str, Any] = {}
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"tasks: {path} includes {name!r}, which is not the name of a file; correct it.")
        merged |= _merged(path.parent / name, (*including, path))
        merged.pop("task_list", None)
    return merged | tree


def _parsed(path: Path) -> dict[str, Any]:
    content = path.read_bytes()  # with its byte order mark, if any
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
        if root is not None:
            _check_plain(path, root)
        tree = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"tasks: {path} is not one plain YAML document ({reason}); correct it.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"tasks={path} holds {type(tree).__name__}, not settings; give an lm-eval task file.")
    return tree


def _check_plain(path: Path, root: yaml.Node) -> None:
    """Raise `ConfigError` if a composed document holds more than plain data."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        line, problem, inner = node.start_mark.line + 1, "", []
        if id(node) in open_nodes:
            problem = f"has an anchor that holds itself (line {line})"
        elif node.tag not in CORE:
            problem = f"has the tag {node.tag} (line {line}), which could run code on this machine"
        elif isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := {key for key in keys if keys.count(key) > 1 and key != "<<"}:
                problem = f"sets {', '.join(sorted(twice))} twice (from line {line})"
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        open_nodes.add(id(node))
        total = 1 if problem else 1 + sum(map(size, inner))
        if total > MOST_NODES:
            problem = f"has more than {MOST_NODES:,} values once its aliases are written out"
        if problem:
            raise ConfigError(f"tasks={path} {problem}; {TRUST}.")
        open_nodes.remove(id(node))
        sizes[id(node)] = total
        return total

    size(root)


# -- all of them together -------------------------------------------------------------------


def _problems(tree: Mapping[str, Any]) -> Iterator[str]:
    for key, value in tree.items():
        if key not in PLAIN and value not in (None, False):
            yield f"it sets {key}"
    yield from _data(tree)
    yield from _metrics(tree.get("metric_list"))
    yield from _templates(tree, "")
    few = tree.get("fewshot_config")
    if isinstance(few, Mapping):
        yield from (f"it sets fewshot_config.{key}" for key in few if key not in OF_FEWSHOT and few[key] is not None)
        yield from _templates(few, "fewshot_config.")
    elif few is not None:
        yield f"fewshot_config is {few!r}"


def _data(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield data that is read by a program of its own, or through a chain of file systems."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    path = tree.get("dataset_path")
    if isinstance(path, str) and path not in READERS:
        if path in {*_PACKAGED_DATASETS_MODULES, "pandas", "sql", "spark", "generator", "cache"}:
            yield f"dataset_path={path} reads files by a program of its own"
        elif (
            path.endswith(".py")
            or "://" in path
            or "::" in path
            or (Path(path).is_dir() and any(Path(path).glob("*.py")))
        ):
            yield f"dataset_path={path} is a program or an address"
    elif path is not None and not isinstance(path, str):
        yield f"dataset_path is {path!r}"
    given = tree.get("dataset_kwargs") or {}
    if not isinstance(given, Mapping):
        yield f"dataset_kwargs is {given!r}"
        return
    yield from (
        f"it sets dataset_kwargs.{key}"
        for key, value in given.items()
        if key not in OF_DATASET and value not in (None, False)
    )
    for text in _texts([given.get("data_files"), given.get("data_dir")]):
        if "::" in text or ("://" in text and not text.startswith(ADDRESSES)):
            yield f"dataset_kwargs names {text}, which is not a plain file or web address"


def _metrics(given: Any) -> Iterator[str]:
    """Yield metrics that lm-eval does not have: it would fetch a script of that name, or import a file."""
    import lm_eval.api.metrics  # noqa: F401  fills the lists
    from lm_eval.api.registry import aggregation_registry, metric_registry

    for entry in given if isinstance(given, list) else [] if given is None else [given]:
        if not isinstance(entry, Mapping):
            yield f"metric_list holds {entry!r}"
            continue
        name, total = entry.get("metric"), entry.get("aggregation")
        if not isinstance(name, str) or name not in metric_registry or entry.get("hf_evaluate"):
            yield f"metric_list names the metric {name}, which lm-eval itself does not have"
        if total is not None and (not isinstance(total, str) or total not in aggregation_registry):
            yield f"metric_list names the aggregation {total}, which lm-eval itself does not have"


def _templates(tree: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield templates that access more than their example. The sandbox refuses what this check does not see."""
    environment = Sandbox()
    for key in TEMPLATES:
        for text in _texts(tree.get(key)):
            try:
                parsed = environment.parse(text)
            except TemplateError:
                continue  # it fails when it is rendered
            for node in parsed.find_all((nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Import, nodes.FromImport)):
                if (reach := _reach(node)) is not None:
                    yield f"the template {where}{key} uses {reach}"


def _reach(node: nodes.Node) -> str | None:
    match node:
        case nodes.Getattr(attr=str(name)) | nodes.Getitem(arg=nodes.Const(value=str(name))) if name.startswith("_"):
            return name
        case nodes.Filter(name="attr"):
            return "the filter attr"
        case nodes.Import() | nodes.FromImport():
            return "import"
    return None


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


# -- templates ------------------------------------------------------------------------------


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja without access to Python, and without products and powers that would exhaust the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("a template may not compute powers")
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple) and isinstance(other, int) and len(one) * other > LONGEST_PRODUCT:
                raise SecurityError(f"a template may not make more than {LONGEST_PRODUCT:,} items")
        return super().call_binop(context, operator, left, right)


@contextmanager
def rendering(trusted: bool) -> Iterator[None]:
    """Render lm-eval's templates in the sandbox, except for a task whose code the user trusts."""
    from lm_eval import utils

    theirs = utils.env
    if not trusted:
        ours = Sandbox(loader=theirs.loader, undefined=theirs.undefined, keep_trailing_newline=True)
        ours.filters["regex_replace"] = theirs.filters["regex_replace"]
        utils.env = ours
    try:
        yield
    finally:
        utils.env = theirs
