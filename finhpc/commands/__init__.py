"""The commands: one file or folder for each, and one row of `COMMANDS`.

The command line, the Python API (`finhpc.pretrain`) and the steps of `finhpc reproduce` all read this table. It is
light: the settings and the function of a command are imported when it runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Generic, NamedTuple, TypeVar

SAME = "same"
SETTINGS = TypeVar("SETTINGS")


def import_named(path: str) -> Any:
    """Import "module:name"."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


class Command(NamedTuple, Generic[SETTINGS]):
    """A command. In Python it is a function: `finhpc.pretrain(config="demo", data={"shards": "shards"})`.

    `settings` is "module:class", and `function` "module:function", which takes the settings and `dry_run`. If
    `dry_run` names another function, each of the two takes the settings alone; None: the command has no dry run.
    `recipes` are patterns of the recipe names that help lists. A command without settings only groups others:
    `bench` those called "bench NAME".
    """

    name: str
    help: str
    settings: str = ""
    function: str = ""
    dry_run: str | None = SAME
    recipes: tuple[str, ...] = ()

    def __call__(
        self,
        settings: SETTINGS | Mapping[str, Any] | None = None,
        dry_run: bool = False,
        *,
        config: str | None = None,
        **keys: Any,
    ) -> dict[str, Any]:
        """Run the command and return its result.

        Settings are an object of the command's class; or a mapping and keywords (`train={"steps": 100}` or
        `**{"train.steps": 100}`) over the recipe or YAML file `config`, over the defaults. Raises `ConfigError` with
        every unknown key and every value that does not fit, as the command line does.
        """
        from finhpc.errors import ConfigError
        from finhpc.settings.base import Section, load

        if isinstance(settings, Section):
            if config is not None or keys:
                raise ConfigError(
                    f"{self.name} got settings as an object and as config or keywords too; give one of the two."
                )
            return self._row_of(settings).run(settings, dry_run)
        if not self.settings:
            raise ConfigError(f"{self.name} takes an object of one of its settings classes: {self._classes()}.")
        return self.run(load(self.settings_class(), config, {**(settings or {}), **keys}), dry_run)  # type: ignore[dict-item]

    def settings_class(self) -> type[Any]:
        cls: type[Any] = import_named(self.settings)
        return cls

    def run(self, settings: Any, dry_run: bool = False) -> dict[str, Any]:
        """Call the command's function with settings of its class."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if self.dry_run == SAME:
            function, arguments = self.function, {"dry_run": dry_run}
        elif dry_run and self.dry_run:
            function, arguments = self.dry_run, {}
        elif not dry_run:
            function, arguments = self.function, {}
        else:
            from finhpc.errors import ConfigError

            raise ConfigError(
                f"{self.name} has no --dry_run, because it only measures; leave it out, or use --print_config to see "
                "what it would measure."
            )
        result: dict[str, Any] = import_named(function)(settings, **arguments)
        return result

    def variants(self) -> dict[str, Command[Any]]:
        """The commands of two words that begin with this one, by their second word."""
        return {name.partition(" ")[2]: row for name, row in COMMANDS.items() if name.startswith(f"{self.name} ")}

    def _row_of(self, settings: Any) -> Command[Any]:
        """This command, or the variant of it whose settings these are."""
        rows = {row.settings: row for row in (self, *self.variants().values())}
        for cls in type(settings).__mro__:
            if row := rows.get(f"{cls.__module__}:{cls.__qualname__}"):
                return row
        from finhpc.errors import ConfigError

        raise ConfigError(f"{self.name} takes {self._classes()}, not {type(settings).__name__}.")

    def _classes(self) -> str:
        rows = (self, *self.variants().values())
        return " or ".join(row.settings.partition(":")[2] for row in rows if row.settings)


PRETRAIN_RECIPES = ("demo", "gpt2-*", "llama2-*")
ROWS: tuple[Command[Any], ...] = (
    Command(
        "prepare",
        "turn text on disk into token shards",
        "finhpc.settings.prepare:PrepareConfig",
        "finhpc.commands.prepare:prepare",
        recipes=("prepare*",),
    ),
    Command(
        "pretrain",
        "train a low-rank or dense model on token shards",
        "finhpc.settings.pretrain:PretrainConfig",
        "finhpc.commands.pretrain:pretrain",
        recipes=PRETRAIN_RECIPES,
    ),
    Command(
        "estimate",
        "plan memory, time and devices; also: estimate finetune",
        "finhpc.settings.estimate:EstimateConfig",
        "finhpc.commands.estimate.command:estimate",
        recipes=PRETRAIN_RECIPES,
    ),
    Command(
        "estimate finetune",
        "plan memory, time and devices of a finetuning",
        "finhpc.settings.estimate:FinetuneEstimateConfig",
        "finhpc.commands.estimate.command:estimate",
        recipes=("finetune*",),
    ),
    Command(
        "sweep",
        "train a grid or search of settings; also: sweep finetune",
        "finhpc.settings.sweep:SweepConfig",
        "finhpc.commands.sweep.command:sweep",
        recipes=PRETRAIN_RECIPES,
    ),
    Command(
        "sweep finetune",
        "finetune with a grid or search of settings",
        "finhpc.settings.sweep:FinetuneSweepConfig",
        "finhpc.commands.sweep.command:sweep",
    ),
    Command(
        "study",
        "compare variants: screen all, train the best on several seeds",
        "finhpc.settings.study:StudyConfig",
        "finhpc.commands.study.command:study",
        recipes=("studies/*",),
    ),
    Command(
        "decompose",
        "turn a dense model into the best low-rank one",
        "finhpc.settings.decompose:DecomposeConfig",
        "finhpc.commands.decompose.command:decompose",
    ),
    Command(
        "finetune",
        "train a LoRA adapter over a frozen 16-, 8- or 4-bit model",
        "finhpc.settings.finetune:FinetuneConfig",
        "finhpc.commands.finetune:finetune",
    ),
    Command(
        "export",
        "write a model for transformers: low-rank, merged or quantized",
        "finhpc.settings.export:ExportConfig",
        "finhpc.commands.export:export",
    ),
    Command(
        "evaluate",
        "score models on general and financial tasks, with intervals",
        "finhpc.settings.evaluate:EvaluateConfig",
        "finhpc.commands.evaluate.command:evaluate",
    ),
    Command(
        "generate",
        "answer prompts, a file of prompts or a chat; with adapters",
        "finhpc.settings.generate:GenerateConfig",
        "finhpc.commands.generate:generate",
    ),
    Command(
        "report",
        "write tables and figures of tracked runs as a web page",
        "finhpc.settings.report:ReportConfig",
        "finhpc.commands.report.command:report",
    ),
    Command("bench", "measure finhpc against plain code; bench --help lists what"),
    *(
        Command(
            f"bench {name}",
            help,
            f"finhpc.bench.settings:{name.capitalize()}Bench",
            f"finhpc.bench.measures.{name}:bench_{name}",
            dry_run=None,
        )
        for name, help in {
            "train": "training steps, and the overhead of a whole run",
            "data": "reading shards",
            "pipeline": "pipeline stages",
            "prepare": "turning text into shards",
            "recompute": "memory saved by recomputing activations",
            "decompose": "factorizing a model",
            "finetune": "finetuning with LoRA",
            "context": "finetuning on long inputs",
            "generate": "generating text",
        }.items()
    ),
    Command(
        "reproduce",
        "run the whole paper at one scale, up to the report",
        "finhpc.settings.reproduce:ReproduceConfig",
        "finhpc.commands.reproduce.command:reproduce",
    ),
    Command(
        "ui",
        "show tracked runs in MLflow's web page, on this machine only",
        "finhpc.settings.report:UiConfig",
        "finhpc.commands.ui:ui",
    ),
)
COMMANDS: dict[str, Command[Any]] = {row.name: row for row in ROWS}
