"""The `finhpc` command line.

    finhpc COMMAND --config FILE_OR_RECIPE --section.key VALUE ...

The commands are the rows of `finhpc.commands.COMMANDS`. Settings come from defaults < recipe or YAML < flags. All
messages go to stderr; with `--json` the result is the last line of stdout.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import finhpc
from finhpc.commands import COMMANDS, Command
from finhpc.errors import ConfigError, FinhpcError
from finhpc.files import private_files
from finhpc.interrupts import drop_closed_streams, interruptible

USAGE = (
    "usage: finhpc COMMAND [--config FILE_OR_RECIPE] [--KEY VALUE ...]\n\ncommands:\n"
    + "\n".join(f"  {name:<9}  {command.help}" for name, command in COMMANDS.items() if " " not in name)
    + """

options of every command:
  --config NAME      a recipe's name or a YAML file
  --KEY VALUE        set a key, e.g. --method.rank 96; COMMAND --help lists all
  --json             print the result as JSON, the last line of stdout
  --print_config     show the resolved settings and stop
  --dry_run          check everything, start and write nothing (not: bench)

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
        if isinstance(error, BrokenPipeError) and drop_closed_streams():
            return 141  # like a command that SIGPIPE ends: the reader of the output is gone
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; complete files on disk are unchanged.", file=sys.stderr)
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


def _run(words: list[str]) -> dict[str, Any] | None:
    """Resolve the settings of the command that the first words name, and run it."""
    command, words = _find(words)
    if "-h" in words or "--help" in words or not command.settings:
        _print(_help(command, words))
        return None
    options, overrides, problems = parse(words, command.settings_class())
    settings = _config().load(command.settings_class(), options.get("config"), overrides, problems)
    if "list_templates" in options:
        from finhpc.data.examples.templates import listing

        _print(listing(settings.data.templates))
        return None
    if "print_config" in options:
        _print(_config().to_yaml(settings).rstrip("\n"))
        return None
    result: dict[str, Any] | None = command.run(settings, dry_run="dry_run" in options)
    return result


def _find(words: list[str]) -> tuple[Command[Any], list[str]]:
    """Return the command that the first words name, and the words after it; "sweep pretrain" is "sweep"."""
    first, *rest = words
    if first not in COMMANDS:
        from finhpc.plugins import load_installed

        load_installed()  # which may add commands
    if first not in COMMANDS or " " in first:
        names = [name for name in COMMANDS if " " not in name]
        raise ConfigError(f"unknown command '{first}'; {_config().nearest(first, names)}")
    command = COMMANDS[first]
    while (variants := command.variants()) and rest and not rest[0].startswith("-"):
        if command.settings:
            variants["pretrain"] = command
        named = f"{command.name} {rest[0]}"
        if rest[0] not in variants:
            names = [f"{command.name} {word}" for word in variants]
            raise ConfigError(f"unknown command '{named}'; {_config().nearest(named, names)}")
        chosen, rest = variants[rest[0]], rest[1:]
        if chosen is command:
            break
        command = chosen
    return command, rest


def _config() -> Any:
    """Import finhpc.settings.base only when a command is run: `finhpc --help` answers at once."""
    return import_module("finhpc.settings.base")


def parse(words: list[str], cls: type[Any]) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Split `--key value` (or `--key=value`) words into options and settings; the third result are the problems.

    Values are YAML (`[8, 16]`, `true`, `1e-3`); a key with several values may be repeated.
    """
    config = _config()
    fields = config.keys(cls)
    switches = {"json", "dry_run", "print_config"} | ({"list_templates"} if "data.templates" in fields else set())
    options: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    groups: list[list[str]] = []  # a flag and the words up to the next one
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    for word, *rest in groups:
        name, equals, value = word.removeprefix("--").partition("=")
        values = [value, *rest] if equals else rest
        kind = str(fields[name].annotation) if name in fields else ""
        extra = values[1:]
        if not word.startswith("--"):
            extra = [word, *rest]
        elif name in switches:
            options[name], extra = "", rest
        elif not values and kind == str(bool):  # --whiten means true
            overrides[name] = True
        elif not values:
            problems.append(f"--{name} has no value; give one: --{name} VALUE.")
        elif name == "config":
            options["config"] = values[0]
        elif name not in fields and name.rpartition(".")[0] not in fields:
            problems.append(f"--{name} is not a setting; {config.nearest(name, ['config', *fields])}")
        elif name == "grid":
            key, equals, spec = values[0].partition("=")
            if not equals:
                problems.append(f"--grid {values[0]} has no values; give --grid 'KEY=[VALUES]'.")
            overrides.setdefault(name, {})[key.strip()] = _numbers(_value(spec, None))
        elif kind.startswith("dict"):
            overrides[name], extra = _mapping(values, overrides.get(name)), []
        elif kind.startswith("list"):  # several words, as from * in a shell, or a YAML list
            items = _value(values[0], None) if len(values) == 1 and values[0].startswith("[") else values
            overrides[name] = [*overrides.get(name, []), *(items if isinstance(items, list) else values)]
            extra = []
        else:
            overrides[name] = _value(values[0], fields.get(name))
        problems += [f"'{one}' is not a flag; write settings as --key value." for one in extra]
    return options, overrides, problems


def _mapping(words: list[str], earlier: Any) -> Any:
    """Return KEY=VALUE words, or a YAML mapping, as a mapping with the earlier ones; other words as a list."""
    if len(words) == 1 and words[0].startswith("{"):
        mapping = _value(words[0], None)
    elif all("=" in word for word in words):
        pairs = [(key.strip(), value) for key, _, value in (word.partition("=") for word in words)]
        mapping = dict(pairs)
        names = [*(earlier if isinstance(earlier, dict) else ()), *(key for key, _ in pairs)]
        if twice := next((key for key in names if names.count(key) > 1), None):
            raise ConfigError(f"{twice} is given twice ({' '.join(words)}); give it once.")
    else:
        return [*earlier, *words] if isinstance(earlier, list) else words
    return earlier | mapping if isinstance(earlier, dict) and isinstance(mapping, dict) else mapping


def _value(text: str, field: Any) -> Any:
    """Read the text of a flag as YAML, with `1e-3` as a number; or as it is if the setting is text."""
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
    """Turn text that YAML does not read as a number, such as 1e-3, into numbers."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return _value(value, None) if isinstance(value, str) else value


def _help(command: Command[Any], words: list[str]) -> str:
    """Describe every setting with its value unless a flag changes it: the recipe's if `words` names one."""
    if not command.settings:
        variants = [f"  {name:<9}  {row.help}" for name, row in command.variants().items()]
        usage = f"usage: finhpc {command.name} NAME [--KEY VALUE ...]"
        return "\n".join([usage, "", *variants, "", f"`finhpc {command.name} NAME --help` lists settings"])
    config = _config()
    source = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config"), None)
    source = next((word.removeprefix("--config=") for word in words if word.startswith("--config=")), source)
    lines = [f"usage: finhpc {command.name} [--config FILE_OR_RECIPE] [--KEY VALUE ...]", "", command.help, ""]
    lines += [f"settings ({f'as {source} sets them' if source else 'default'}):"]
    fields, values = config.keys(command.settings_class()), config.defaults(command.settings_class(), source)
    lines += [f"  --{name} ({values[name]})  {fields[name].description}" for name in fields]
    if "model.preset" in fields:
        from finhpc.models.families.presets import PRESETS

        lines += ["", f"shapes for --model.preset: {', '.join(PRESETS)}"]
    recipes = [name for name in config.recipes() if any(fnmatchcase(name, one) for one in command.recipes)]
    if recipes:
        lines += ["", f"recipes for --config: {', '.join(recipes)}"]
    wrapper = textwrap.TextWrapper(
        shutil.get_terminal_size().columns, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )  # the terminal's width, or 80 columns
    return "\n".join(map(wrapper.fill, lines))


if __name__ == "__main__":
    sys.exit(main())
