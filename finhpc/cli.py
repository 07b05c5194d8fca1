"""The `finhpc` command: one verb per job, each a row of `COMMANDS`.

    finhpc VERB --config FILE_OR_RECIPE --section.key VALUE ...

Settings come from defaults < recipe or YAML < flags. All messages go to stderr; with `--json` the
result is the last line of stdout.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import finhpc
from finhpc.errors import ConfigError, FinhpcError
from finhpc.files import private_files
from finhpc.interrupts import interruptible


class Command(NamedTuple):
    """`settings`: module:class of its settings. `work`: module:function, which takes the settings and `dry_run`."""

    about: str
    settings: str
    work: str


SETTINGS, WORK = "finhpc.settings.", "finhpc.commands."
COMMANDS = {
    "prepare": Command("text on disk -> token shards", f"{SETTINGS}prepare:PrepareConfig", f"{WORK}prepare:prepare"),
    "pretrain": Command(
        "token shards -> a low-rank (or dense) model", f"{SETTINGS}pretrain:PretrainConfig", f"{WORK}pretrain:pretrain"
    ),
    "estimate": Command(
        "memory, time and devices of a pretrain; or: estimate finetune",
        f"{SETTINGS}estimate:EstimateConfig",
        f"{WORK}estimate.command:estimate",
    ),
    "estimate finetune": Command("", f"{SETTINGS}estimate:FinetuneEstimateConfig", f"{WORK}estimate.command:estimate"),
    "sweep": Command(
        "a grid or search over settings of pretrain; or: sweep finetune",
        f"{SETTINGS}sweep:SweepConfig",
        f"{WORK}sweep.command:sweep",
    ),
    "sweep finetune": Command("", f"{SETTINGS}sweep:FinetuneSweepConfig", f"{WORK}sweep.command:sweep"),
    "study": Command(
        "variants of a run: screened, the best trained on several seeds",
        f"{SETTINGS}study:StudyConfig",
        f"{WORK}study.command:study",
    ),
    "decompose": Command(
        "a dense model -> a low-rank one of its best factors",
        f"{SETTINGS}decompose:DecomposeConfig",
        f"{WORK}decompose.command:decompose",
    ),
    "finetune": Command(
        "examples and a frozen base, 16, 8 or 4 bits -> a LoRA adapter",
        f"{SETTINGS}finetune:FinetuneConfig",
        f"{WORK}finetune:finetune",
    ),
    "export": Command(
        "a trained model -> a folder for transformers, low-rank or merged",
        f"{SETTINGS}export:ExportConfig",
        f"{WORK}export:export",
    ),
    "evaluate": Command(
        "models -> scores on general and financial tasks, with intervals",
        f"{SETTINGS}evaluate:EvaluateConfig",
        f"{WORK}evaluate.command:evaluate",
    ),
    "generate": Command(
        "prompts, a file of them or a chat -> text; adapters over one base",
        f"{SETTINGS}generate:GenerateConfig",
        f"{WORK}generate:generate",
    ),
    "report": Command(
        "what was tracked -> the paper's tables and figures, as a page",
        f"{SETTINGS}report:ReportConfig",
        f"{WORK}report.command:report",
    ),
    "bench": Command("finhpc measured against the plain way; bench --help lists what", "", "finhpc.bench:bench"),
    "reproduce": Command(
        "the whole paper at one scale, from pretraining to the report",
        f"{SETTINGS}reproduce:ReproduceConfig",
        f"{WORK}reproduce.command:reproduce",
    ),
    "ui": Command(
        "MLflow's page of what was tracked, on this machine only", f"{SETTINGS}report:UiConfig", f"{WORK}ui:ui"
    ),
}

USAGE = (
    "usage: finhpc VERB [--config FILE_OR_RECIPE] [--KEY VALUE ...]\n\nverbs:\n"
    + "\n".join(f"  {verb:<9}  {command.about}" for verb, command in COMMANDS.items() if command.about)
    + """

options of every verb:
  --config NAME      a recipe's name or a YAML file
  --KEY VALUE        set one key, e.g. --method.rank 96 (VERB --help lists them)
  --json             print the result as JSON, the last line of stdout
  --print_config     show the resolved settings and stop
  --dry_run          check and count everything, start and write nothing

finhpc --version"""
)


@interruptible
def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 for a failed job, 2 for a user's mistake."""
    words = sys.argv[1:] if argv is None else argv
    try:
        with private_files():
            return _main(words)
    except FinhpcError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _drop_closed_streams():
            return 141  # as a command that SIGPIPE ends: whoever read this one's output has left
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; what was complete on disk is untouched.", file=sys.stderr)
        return 1


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        _print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        _print(finhpc.__version__)
        return 0
    result = _run(words)
    if "--json" in words:
        _print(json.dumps(result))
    return 0


def _print(text: str) -> None:
    print(text, flush=True)


def _drop_closed_streams() -> bool:
    """Point stdout and stderr at nothing if their reader has left, so that no later write fails; whether one had."""
    dropped = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a stream that is no file
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                dropped = True
    return dropped


def _run(words: list[str]) -> dict[str, Any] | None:
    """Find the command that the first words name, resolve its settings and do its work."""
    verb, *rest = words
    if verb == "bench":
        return _bench(rest)
    if verb in ("sweep", "estimate") and rest and not rest[0].startswith("-"):
        of = ["pretrain", "finetune"]
        if rest[0] not in of:
            raise ConfigError(f"{verb} {rest[0]} is not possible; {_config().nearest(rest[0], of)}")
        verb, rest = (verb if rest[0] == "pretrain" else f"{verb} finetune"), rest[1:]
    if verb not in COMMANDS:
        raise ConfigError(f"unknown command {verb!r}; {_config().nearest(verb, [v for v in COMMANDS if ' ' not in v])}")
    command = COMMANDS[verb]
    return _settle(verb, _named(command.settings), command.work, rest)


def _bench(words: list[str]) -> dict[str, Any] | None:
    from finhpc.bench.settings import BENCHES

    if not words or words[0] in ("-h", "--help"):
        names = ", ".join(BENCHES)
        _print(
            f"usage: finhpc bench NAME [--KEY VALUE ...]\n\nNAME: {names}\n`finhpc bench NAME --help` lists settings"
        )
        return None
    if words[0] not in BENCHES:
        raise ConfigError(f"unknown bench {words[0]!r}; {_config().nearest(words[0], list(BENCHES))}")
    return _settle(f"bench {words[0]}", BENCHES[words[0]][0], COMMANDS["bench"].work, words[1:])


def _settle(verb: str, cls: type[Any], work: str, words: list[str]) -> dict[str, Any] | None:
    """Resolve a command's settings and do its work."""
    config = _config()
    if "-h" in words or "--help" in words:
        _print(_help(verb, cls, words))
        return None
    options, overrides, problems = _parse(words, cls)
    settings = config.load(cls, options.get("config"), overrides, problems)
    if "list_templates" in options:
        from finhpc.data.examples.templates import listing

        _print(listing(settings.data.templates))
        return None
    if "print_config" in options:
        _print(config.to_yaml(settings).rstrip("\n"))
        return None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    function: Callable[..., dict[str, Any] | None] = _named(work)
    return function(settings, dry_run="dry_run" in options)


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _config() -> Any:
    """finhpc.settings.base, imported only when a command is run: `finhpc --help` answers at once."""
    return import_module("finhpc.settings.base")


def parse(words: list[str], cls: type[Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Split `--key value` (or `--key=value`) words into the verb's options and settings.

    Values are YAML (`[8, 16]`, `true`, `1e-3`); a key of several values may be repeated. Raises
    `ConfigError` with every word that does not fit.
    """
    options, overrides, problems = _parse(words, cls)
    if problems:
        raise ConfigError(problems)
    return options, overrides


def _parse(words: list[str], cls: type[Any]) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """The same, with the problems in place of an error."""
    config = _config()
    fields = config.keys(cls)
    options: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    i = 0
    while i < len(words):
        word, i = words[i], i + 1
        if not word.startswith("--"):
            problems.append(f"{word} is no flag; settings are given as --key value.")
            continue
        name, equals, value = word[2:].partition("=")
        if name in ("json", "dry_run", "print_config") or (name == "list_templates" and "data.templates" in fields):
            options[name] = ""
            continue
        if not equals:
            if i == len(words) or words[i].startswith("--"):
                if name in fields and fields[name].annotation is bool:  # --whiten says true
                    overrides[name] = True
                    continue
                problems.append(f"--{name} has no value; give one: --{name} VALUE.")
                continue
            value, i = words[i], i + 1
        known = name == "config" or name in fields or name.rpartition(".")[0] in fields
        if not known:
            problems.append(f"--{name} is not a setting; {config.nearest(name, ['config', *fields])}")
        elif name == "config":
            options["config"] = value
        elif name == "grid":
            key, equals, spec = value.partition("=")
            if not equals:
                problems.append(f"--grid {value} names no values; give --grid 'KEY=[VALUES]'.")
            overrides.setdefault(name, {})[key.strip()] = _numbers(_value(spec, None))
        elif str(fields[name].annotation if name in fields else "").startswith("dict"):
            values = [value]
            while i < len(words) and not words[i].startswith("--"):
                values, i = [*values, words[i]], i + 1
            overrides[name] = _mapping(values, overrides.get(name))
        elif str(fields[name].annotation if name in fields else "").startswith("list"):
            overrides.setdefault(name, []).append(value)
            while i < len(words) and not words[i].startswith("--"):  # as a shell's * gives them
                overrides[name].append(words[i])
                i += 1
        else:
            overrides[name] = _value(value, fields.get(name))
    return options, overrides, problems


def _mapping(words: list[str], before: Any) -> Any:
    """KEY=VALUE words as a mapping, with those given before; a YAML mapping as such; other words as a list."""
    if len(words) == 1 and words[0].startswith("{"):
        found = _value(words[0], None)
    elif all("=" in word for word in words):
        pairs = [(key.strip(), value) for key, _, value in (word.partition("=") for word in words)]
        found = dict(pairs)
        given = [*(before if isinstance(before, dict) else ()), *(key for key, _ in pairs)]
        if twice := next((key for key in given if given.count(key) > 1), None):
            raise ConfigError(f"{twice} is given twice ({' '.join(words)}); give it once.")
    else:
        return [*before, *words] if isinstance(before, list) else words
    return before | found if isinstance(before, dict) and isinstance(found, dict) else found


def _value(text: str, field: Any) -> Any:
    """A flag's text as YAML, but as plain text where the setting is text; `1e-3` is a number."""
    import yaml

    from finhpc.textfile import parse_yaml

    if field is not None and "str" in str(field.annotation) and "dict" not in str(field.annotation):
        return None if text == "null" else text
    try:
        return float(text) if not text.lstrip("+-").isdigit() else int(text)
    except ValueError:
        pass
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def _numbers(value: Any) -> Any:
    """With what YAML took for text, such as 1e-3, as numbers."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return _value(value, None) if isinstance(value, str) else value


def _help(verb: str, cls: type[Any], words: list[str]) -> str:
    """Every setting with the value it has unless a flag changes it: the recipe's where `words` names one."""
    config = _config()
    source = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config"), None)
    source = next((word.removeprefix("--config=") for word in words if word.startswith("--config=")), source)
    of = f"as {source} sets them" if source else "default"
    lines = [f"usage: finhpc {verb} [--config FILE_OR_RECIPE] [--KEY VALUE ...]", "", f"settings ({of}):"]
    fields, shown = config.keys(cls), config.defaults(cls, source)
    lines += [f"  --{name} ({shown[name]})  {fields[name].description}" for name in fields]
    if "model.preset" in fields:
        from finhpc.models.families.presets import PRESETS

        lines += ["", f"shapes for --model.preset: {', '.join(PRESETS)}"]
    if named := _recipes(verb):
        lines += ["", f"recipes for --config: {', '.join(named)}"]
    return "\n".join(lines)


def _recipes(verb: str) -> list[str]:
    """Names of the recipes that hold settings of the command."""
    own = {"prepare": "prepare", "study": "studies/", "reproduce": "reproduce/", "estimate finetune": "finetune"}
    names: list[str] = list(_config().recipes())
    if verb in ("pretrain", "estimate", "sweep"):
        return [name for name in names if not name.startswith(tuple(own.values()))]
    return [name for name in names if name.startswith(own[verb])] if verb in own and verb != "reproduce" else []


if __name__ == "__main__":
    sys.exit(main())
