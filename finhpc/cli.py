"""The `finhpc` command: one verb a job.

    finhpc VERB --config FILE_OR_RECIPE --section.key VALUE ...

Settings come from defaults < recipe or YAML < flags. All messages go to stderr; with `--json` the
result is the last line of stdout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import finhpc
from finhpc.errors import ConfigError, FinhpcError

USAGE = """usage: finhpc VERB [--config FILE_OR_RECIPE] [--KEY VALUE ...]

verbs:
  prepare    text on disk -> token shards
  pretrain   token shards -> a low-rank (or dense) model
  estimate   memory, time and the cluster that a pretrain would need, before it starts; estimate finetune: a finetune
  sweep      a grid or a search over any settings of pretrain (or: sweep finetune), on Ray Tune, ranked
  study      variants of a run beside each other: screened, the best trained for long on several seeds
  decompose  a dense model -> a low-rank one of its best factors
  finetune   examples and a frozen base, 16, 8 or 4 bits -> a LoRA adapter
  export     a trained model -> a folder for transformers: low-rank or merged, 16, 8 or 4 bits
  evaluate   models -> scores on general and financial tasks, with baselines and intervals
  generate   prompts, a file of them or a chat -> text; adapters over one base
  report     what was tracked -> the paper's tables and figures, its figures beside ours, as a page
  bench      measure finhpc beside the plain way: finhpc bench --help names what
  reproduce  the whole paper at one scale: pretraining, finetuning, scores, speeds, and the report
  ui         open MLflow's page of what was tracked, on this machine only

options of every verb:
  --config NAME      a recipe's name or a YAML file
  --KEY VALUE        set one key, e.g. --method.rank 96 (finhpc VERB --help lists them)
  --json             print the result as one JSON object, the last line of stdout
  --print_config     show the resolved settings and stop
  --dry_run          check and count everything, start nothing (of every verb that computes)

finhpc --version"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 for a failed job, 2 for a user's mistake."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        print(finhpc.__version__)
        return 0
    try:
        result = _run(words[0], words[1:])
    except FinhpcError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; what was complete on disk is untouched.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        if type(error).__name__ == "Terminated":
            return 143
        raise
    if "--json" in words:
        print(json.dumps(result), flush=True)
    return 0


def _run(verb: str, words: list[str]) -> dict[str, Any] | None:
    from finhpc import config

    if verb == "bench":
        return _bench(words)
    if verb == "sweep":
        return _sweep(words)
    if verb == "estimate" and words[:1] == ["finetune"]:
        return _settle("estimate finetune", config.FinetuneEstimateConfig, _estimate_finetune, words[1:])
    verbs: dict[str, tuple[type[config.Section], Callable[..., dict[str, Any] | None]]] = {
        "prepare": (config.PrepareConfig, _prepare),
        "pretrain": (config.PretrainConfig, _pretrain),
        "estimate": (config.EstimateConfig, _estimate),
        "study": (config.StudyConfig, _study),
        "decompose": (config.DecomposeConfig, _decompose),
        "generate": (config.GenerateConfig, _generate),
        "finetune": (config.FinetuneConfig, _finetune),
        "export": (config.ExportConfig, _export),
        "evaluate": (config.EvaluateConfig, _evaluate),
        "report": (config.ReportConfig, _report),
        "reproduce": (config.ReproduceConfig, _reproduce),
        "ui": (config.UiConfig, _ui),
    }
    if verb not in verbs:
        raise ConfigError(f"{verb} is no verb; {config.nearest(verb, list(verbs))}")
    return _settle(verb, *verbs[verb], words)


def _settle(
    verb: str, cls: type[Any], work: Callable[..., dict[str, Any] | None], words: list[str]
) -> dict[str, Any] | None:
    """Resolve a verb's settings and do its work."""
    from finhpc import config

    if "-h" in words or "--help" in words:
        print(_help(verb, cls))
        return None
    options, overrides = parse(words, cls)
    settings = config.load(cls, options.get("config"), overrides)
    if "list_templates" in options:
        from finhpc.data.templates import listing

        print(listing(settings.data.templates))
        return None
    if "print_config" in options:
        print(config.to_yaml(settings), end="")
        return None
    return work(settings, "dry_run" in options)


def _bench(words: list[str]) -> dict[str, Any] | None:
    from finhpc import config
    from finhpc.bench.settings import BENCHES, function_of

    names = ", ".join(BENCHES)
    if not words or words[0] in ("-h", "--help"):
        print(
            f"usage: finhpc bench NAME [--KEY VALUE ...]\n\nNAME: {names}; finhpc bench NAME --help lists its settings"
        )
        return None
    name = words[0]
    if name not in BENCHES:
        raise ConfigError(f"{name} is no bench; {config.nearest(name, list(BENCHES))}")

    def work(settings: Any, dry_run: bool) -> Any:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return function_of(name)(settings)

    return _settle(f"bench {name}", BENCHES[name][0], work, words[1:])


def _sweep(words: list[str]) -> dict[str, Any] | None:
    """Of pretrain, or of the verb that its first word names."""
    from finhpc import config

    of: dict[str, type[config.Section]] = {"pretrain": config.SweepConfig, "finetune": config.FinetuneSweepConfig}
    verb = words[0] if words and not words[0].startswith("-") else "pretrain"
    if verb not in of:
        raise ConfigError(f"sweep {verb} is not possible; {config.nearest(verb, list(of))}")

    def work(settings: Any, dry_run: bool) -> dict[str, Any]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from finhpc.orchestration.sweep import sweep

        return sweep(settings, dry_run=dry_run)

    return _settle(f"sweep {verb}", of[verb], work, words[words[:1] == [verb] :])


def parse(words: list[str], cls: type[Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Split `--key value` (or `--key=value`) words into the verb's options and settings.

    Values are YAML (`[8, 16]`, `true`, `1e-3`); a key of several values may be repeated. Raises
    `ConfigError` with every word that does not fit.
    """
    from finhpc import config

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
    if problems:
        raise ConfigError(problems)
    return options, overrides


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


def _help(verb: str, cls: type[Any]) -> str:
    from finhpc import config

    lines = [f"usage: finhpc {verb} [--config FILE_OR_RECIPE] [--KEY VALUE ...]", "", "settings (default):"]
    for name, field in config.keys(cls).items():
        default = field.get_default(call_default_factory=True)
        about = f"  {field.description}" if field.description else ""
        lines.append(f"  --{name} ({'none' if default is None else default}){about}")
    if "model.preset" in config.keys(cls):
        from finhpc.models.presets import PRESETS

        lines += ["", f"shapes for --model.preset: {', '.join(PRESETS)}"]
    if verb in ("prepare", "pretrain", "estimate", "estimate finetune", "study"):
        kinds = {"prepare": "prepare", "study": "studies/", "reproduce": "reproduce/", "estimate finetune": "finetune"}
        first = kinds.get(verb)
        named = [
            name
            for name in config.recipes()
            if (name.startswith(first) if first else not name.startswith(tuple(kinds.values())))
        ]
        lines += ["", f"recipes for --config: {', '.join(named)}"]
    return "\n".join(lines)


def _prepare(settings: Any, dry_run: bool) -> dict[str, Any]:
    from finhpc.data.prepare import prepare

    return prepare(settings)


def _pretrain(settings: Any, dry_run: bool) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from finhpc.orchestration.pretrain import pretrain

    return pretrain(settings, dry_run=dry_run)


def _study(settings: Any, dry_run: bool) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from finhpc.orchestration.study import study

    return study(settings, dry_run=dry_run)


def _decompose(settings: Any, dry_run: bool) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from finhpc.orchestration.decompose import decompose

    return decompose(settings, dry_run=dry_run)


def _generate(settings: Any, dry_run: bool) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from finhpc.evaluation.generate import generate

    return generate(settings)


def _finetune(settings: Any, dry_run: bool) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from finhpc.orchestration.finetune import finetune

    return finetune(settings, dry_run=dry_run)


def _export(settings: Any, dry_run: bool) -> dict[str, Any]:
    from finhpc.models.export import export

    return export(settings, dry_run=dry_run)


def _evaluate(settings: Any, dry_run: bool) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from finhpc.orchestration.evaluate import evaluate

    return evaluate(settings, dry_run=dry_run)


def _reproduce(settings: Any, dry_run: bool) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from finhpc.orchestration.reproduce import reproduce

    return reproduce(settings, dry_run=dry_run)


def _estimate(settings: Any, dry_run: bool) -> dict[str, Any]:
    from finhpc.orchestration.estimate import estimate

    return estimate(settings)


def _report(settings: Any, dry_run: bool) -> dict[str, Any]:
    from finhpc.reporting.report import report

    return report(settings, dry_run=dry_run)


def _estimate_finetune(settings: Any, dry_run: bool) -> dict[str, Any]:
    from finhpc.orchestration.estimate_finetune import estimate_finetune

    return estimate_finetune(settings)


def _ui(settings: Any, dry_run: bool) -> None:
    from finhpc.orchestration.ui import ui

    ui(settings.run.storage, settings.run.tracking_uri, settings.port)


if __name__ == "__main__":
    sys.exit(main())
