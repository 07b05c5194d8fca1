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
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(
                f"{self.name} takes {self._classes()}, a mapping or keywords, not {settings!r}; give a recipe or YAML "
                'file by name: config="demo".'
            )
        return self.run(load(self.settings_class(), config, {**(settings or {}), **keys}), dry_run)

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
        """The commands of one word more that begin with this one, by that word."""
        names = {name: name.removeprefix(f"{self.name} ") for name in COMMANDS if name.startswith(f"{self.name} ")}
        return {word: COMMANDS[name] for name, word in names.items() if " " not in word}

    def _row_of(self, settings: Any) -> Command[Any]:
        """This command, or the one below it whose settings these are."""
        rows = {row.settings: row for row in self._rows()}
        for cls in type(settings).__mro__:
            if row := rows.get(f"{cls.__module__}:{cls.__qualname__}"):
                return row
        from finhpc.errors import ConfigError

        raise ConfigError(f"{self.name} takes {self._classes()}, not {type(settings).__name__}.")

    def _classes(self) -> str:
        return " or ".join(row.settings.partition(":")[2] for row in self._rows() if row.settings)

    def _rows(self) -> list[Command[Any]]:
        """This command and all that begin with it."""
        return [self, *(row for name, row in COMMANDS.items() if name.startswith(f"{self.name} "))]


def _own(
    name: str, help: str, settings: str, function: str, recipes: tuple[str, ...] = (), dry_run: str = SAME
) -> Command[Any]:
    """A row with settings in finhpc.settings and functions in finhpc.commands."""
    if dry_run != SAME:
        dry_run = f"finhpc.commands.{dry_run}"
    return Command(name, help, f"finhpc.settings.{settings}", f"finhpc.commands.{function}", dry_run, recipes)


def _bench(name: str, help: str, settings: str = "", function: str = "", recipes: tuple[str, ...] = ()) -> Command[Any]:
    settings = f"finhpc.bench.settings:{settings or name.capitalize() + 'Bench'}"
    function = f"finhpc.bench.measures.{function or f'{name}:bench_{name}'}"
    return Command(f"bench {name}", help, settings, function, dry_run=None, recipes=recipes)


PRETRAIN = ("demo", "gpt2-*", "llama2-*")  # recipes
ROWS: tuple[Command[Any], ...] = (
    _own("prepare", "turn text on disk into token shards", "prepare:PrepareConfig", "prepare:prepare", ("prepare*",)),
    _own(
        "pretrain",
        "train a low-rank or dense model on token shards",
        "pretrain:PretrainConfig",
        "pretrain:pretrain",
        PRETRAIN,
        dry_run="estimate.dry_run:dry_run",
    ),
    _own(
        "estimate",
        "plan memory, time and devices; also: estimate finetune",
        "estimate:EstimateConfig",
        "estimate.command:estimate",
        PRETRAIN,
    ),
    _own(
        "estimate finetune",
        "plan memory, time and devices of a finetuning",
        "estimate:FinetuneEstimateConfig",
        "estimate.command:estimate",
        ("finetune*",),
    ),
    _own(
        "sweep",
        "train a grid or search of settings; also: sweep finetune",
        "sweep:SweepConfig",
        "sweep.command:sweep",
        PRETRAIN,
    ),
    _own(
        "sweep finetune",
        "finetune with a grid or search of settings",
        "sweep:FinetuneSweepConfig",
        "sweep.command:sweep",
    ),
    _own(
        "study",
        "compare variants: screen all, train the best on several seeds",
        "sweep:StudyConfig",
        "study.command:study",
        ("studies/*",),
    ),
    _own(
        "decompose",
        "turn a dense model into the best low-rank one",
        "decompose:DecomposeConfig",
        "decompose.command:decompose",
    ),
    _own(
        "finetune",
        "train a LoRA adapter over a frozen 16-, 8- or 4-bit model",
        "finetune:FinetuneConfig",
        "finetune:finetune",
        dry_run="estimate.dry_run:dry_run",
    ),
    _own(
        "export",
        "write a model for transformers: low-rank, merged or quantized",
        "export:ExportConfig",
        "export:export",
    ),
    _own(
        "evaluate",
        "score models on general and financial tasks, with intervals",
        "evaluate:EvaluateConfig",
        "evaluate.command:evaluate",
    ),
    _own(
        "generate",
        "answer prompts, a file of prompts or a chat; with adapters",
        "generate:GenerateConfig",
        "generate:generate",
    ),
    _own("serve", "serve a model and its adapters with OpenAI's API", "serve:ServeConfig", "serve:serve"),
    _own(
        "report",
        "write tables and figures of tracked runs as a web page",
        "report:ReportConfig",
        "report.command:report",
    ),
    Command("bench", "measure finhpc against plain code; bench --help lists what"),
    _bench("train", "training steps, and the overhead of a whole run"),
    _bench("step", "what a step asks of a GPU, counted; also: bench step finetune", recipes=PRETRAIN),
    _bench(
        "step finetune",
        "what a finetuning step asks of a GPU, counted",
        settings="FinetuneStepBench",
        function="step:bench_step_finetune",
        recipes=("finetune*",),
    ),
    _bench("gpu", "all that matters on one GPU, in a few minutes"),
    _bench("data", "reading shards"),
    _bench("pipeline", "pipeline stages"),
    _bench("prepare", "turning text into shards"),
    _bench("recompute", "memory saved by recomputing activations"),
    _bench("decompose", "factorizing a model"),
    _bench("finetune", "finetuning with LoRA"),
    _bench("context", "finetuning on long inputs"),
    _bench("generate", "generating text"),
    _bench("export", "exported models in the runtimes they are for"),
    _bench("serve", "a server under load, compared with vLLM's", function="load.bench:bench_serve"),
    _own(
        "reproduce",
        "run the whole paper at one scale, up to the report",
        "reproduce:ReproduceConfig",
        "reproduce.command:reproduce",
    ),
    _own("ui", "show tracked runs in MLflow's web page, on this machine only", "report:UiConfig", "ui:ui"),
)
COMMANDS: dict[str, Command[Any]] = {row.name: row for row in ROWS}
