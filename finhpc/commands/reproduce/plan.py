"""A reproduction before it starts: every step checked as far as its inputs exist, counted, and listed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finhpc.cluster.connect import check_fits, use_cuda
from finhpc.commands import COMMANDS
from finhpc.commands.estimate.figures import cluster_of
from finhpc.commands.estimate.pretraining import pretraining_costs
from finhpc.commands.reproduce.recipe import RESULTS, AbsentError, Tree, inputs_of, merged, resolve, step_config
from finhpc.errors import ConfigError, collect
from finhpc.lowrank.registry import SVD
from finhpc.planning.devices import CPU_REACHED, THIS_MACHINE, Cluster
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import Section, build
from finhpc.settings.decompose import DecomposeConfig
from finhpc.settings.estimate import EstimateConfig, FinetuneEstimateConfig
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.prepare import PrepareConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.reproduce import HoldOutConfig, Recipe, ReproduceConfig, Step

DONE = ("finished", "done")  # statuses that commands write into a result


@dataclass
class PlannedStep:
    """A step of a reproduction. `config`: its settings as far as they are known; None if it cannot run, see `why`.

    `unchecked`: inputs that are not here yet; the figures, of a training, are estimates. Once it ended, `status` is
    finished, failed or not run; `why` has the reason for the last two in one line.
    """

    step: Step
    folder: Path
    config: Section | None = None
    why: str = ""
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    params: int | None = None
    tokens: int | None = None
    hours: float | None = None
    workers: int | None = None
    status: str = "not run"
    wall_s: float | None = None
    result: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether its folder has a result; the command itself looks more closely."""
        try:
            return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))["status"] in DONE
        except (OSError, ValueError, KeyError):
            return False

    def row(self) -> dict[str, Any]:
        """The step in the table before the start and in the result of a dry run."""
        state = "left out" if self.config is None else "finished" if self.finished else "to do"
        figures = {"params": self.params, "tokens": self.tokens, "workers": self.workers, "hours": self.hours}
        about = {"why": self.why, "unchecked": self.unchecked, "notes": self.notes}
        return {"step": self.step.name, "verb": self.step.verb, "state": state} | figures | about


def plan_steps(study: ReproduceConfig, recipe: Recipe) -> list[PlannedStep]:
    """Check every step; raises one `ConfigError` with every problem of all of them."""
    planner = _Planner(study, recipe)
    with collect(planner.problems):
        planner.known |= inputs_of(study, recipe)
    steps = [planner.plan(step) for step in recipe.steps]
    if planner.problems:
        raise ConfigError(planner.problems)
    return steps


def misplaced(steps: list[PlannedStep], total: Mapping[str, float]) -> list[str]:
    """What a cluster of `total` resources cannot place: each problem once, with the steps that have it."""
    names: dict[str, list[str]] = {}
    for one in steps:
        if isinstance(one.config, PretrainConfig | FinetuneConfig):
            problems: list[str] = []
            with collect(problems):
                check_fits(one.config, use_cuda(one.config.resources, dict(total)), dict(total))
            for problem in problems:
                names.setdefault(problem, []).append(one.step.name)
    return [f"{', '.join(steps)}: {problem}" for problem, steps in names.items()]


class _Planner:
    """Plans one step after the other; `problems` collects what is wrong with any of them."""

    def __init__(self, study: ReproduceConfig, recipe: Recipe) -> None:
        self.study, self.recipe = study, recipe
        self.problems: list[str] = []
        self.known: Tree = {}
        self.pretrained: dict[str, PretrainConfig] = {}  # model folder -> the run that will write it
        self.vocab: dict[str, int] = {}  # shards -> size of the tokenizer that is trained for them
        self.reasons: dict[str, str] = {}  # step -> why it will not run
        self.coming: set[str] = set()  # folders that earlier steps will write

    def plan(self, step: Step) -> PlannedStep:
        planned = PlannedStep(step, RunFolder(self.study.run.storage, f"{self.study.run.name}-{step.name}").path)
        problems: list[str] = []
        with collect(problems):
            try:
                tree = resolve(merged(self.recipe, step), self.known, [])
                planned.config = step_config(self.study, step, tree)
            except AbsentError as absent:
                planned.why = self.reasons.get(absent.name, f"{absent.name} is not given")
                self.reasons[step.name] = planned.why
        if planned.config is not None:
            with collect(problems):
                self._check(planned, planned.config)
            self.known[step.name] = {
                key: str(planned.folder / value) if str(value).startswith(".") else value
                for key, value in RESULTS[step.verb].items()
            }
            self.coming.add(str(planned.folder))
        self.problems += [f"step {step.name}: {problem}" for problem in problems]
        return planned

    def _check(self, planned: PlannedStep, config: Section) -> None:
        """Let the command check whatever is here; the rest is `unchecked`."""
        match config:
            case PrepareConfig():
                from finhpc.data.text import sources, tokenizer

                if (size := tokenizer.trained_size(config.tokenizer)) is not None:
                    self.vocab[config.out] = size
                here = self._here(planned, config.source, hub_only=True)
                if here or not config.source:
                    sources.units(config.model_copy(update={"source": here}))
            case PretrainConfig():
                self._count(planned, config)
            case FinetuneConfig():
                self._check_finetuning(planned, config)
            case DecomposeConfig():
                if self._here(planned, [config.model]):
                    COMMANDS["decompose"].run(config, dry_run=True)
            case HoldOutConfig():
                from finhpc.evaluation.hold_out import held_out_documents

                if self._here(planned, config.source, hub_only=True) == config.source:
                    held_out_documents(config)
            case EvaluateConfig():
                from finhpc.evaluation.documents import SOURCES, documents
                from finhpc.evaluation.models import subjects

                for name in self._here(planned, [*config.model, *config.adapter]):
                    subjects([name], [])
                for task in config.tasks:
                    if task in SOURCES and self._here(planned, [config.data.files.get(task, "")], hub_only=True):
                        documents(task, config.data, 1, config.seed)

    def _here(self, planned: PlannedStep, names: Iterable[str], hub_only: bool = False) -> list[str]:
        """Those inputs that are here, or will be missed; notes those of the hub.

        `hub_only`: only `hf:...` names the hub, so that a path which does not exist is a mistake.
        """
        names = [name for name in names if not self._is_coming(name)]
        away = [name for name in names if name.startswith("hf:") or not (hub_only or Path(name).expanduser().exists())]
        planned.unchecked += [f"{name} (the hub)" for name in away]
        return [name for name in names if name not in away]

    def _is_coming(self, path: str) -> bool:
        return any(path == folder or path.startswith(folder + "/") for folder in self.coming)

    def _count(self, planned: PlannedStep, config: PretrainConfig) -> None:
        """Check and count a pretraining; methods 2 and 3 have the shape of the run whose model they start from."""
        start = config
        while start.model.path in self.pretrained:
            start = self.pretrained[start.model.path]
        self.pretrained[str(planned.folder / "model")] = config
        model, method = start.model, config.method
        if model.path is None and model.vocab_size is None and config.data.shards in self.vocab:
            model = model.model_copy(update={"vocab_size": self.vocab[config.data.shards]})
        if start is not config and method.kind == SVD:  # a model from scratch has the same ranks
            method = method.model_copy(update={"kind": "low_rank"})
        changed = {"model": model.model_dump(), "method": method.model_dump(), "estimate": self._hardware(config)}
        planning = build(EstimateConfig, config.model_dump() | changed)
        costs, cluster, steps = pretraining_costs(planning), cluster_of(planning), planning.train.steps
        _note_memory(planned, costs.fullest.peak_bytes, cluster)
        planned.params, planned.workers = costs.outline.params, config.parallel.workers
        planned.tokens = steps * config.parallel.samples_per_step * config.data.seq_len
        planned.hours = steps * costs.pace(cluster).step_s / 3600

    def _check_finetuning(self, planned: PlannedStep, config: FinetuneConfig) -> None:
        """With all inputs here, as finetune checks it; else count the adapters if the shape of the base is known."""
        planned.workers, base = config.parallel.workers, str(config.model.path)
        complete = self._here(planned, config.data.source, hub_only=True) == config.data.source
        if self._is_coming(base):
            planned.unchecked.append("the base, which an earlier step makes")
        elif self._here(planned, [base]) and complete:
            from finhpc.commands.finetune import Finetune

            planned.params = Finetune(config).counts()["params_trainable"]
        elif base in self.recipe.shapes and not Path(base).exists():
            from finhpc.commands.estimate.finetuning import finetuning_costs

            changed = {"model": {"preset": self.recipe.shapes[base]}, "estimate": self._hardware(config)}
            planning = build(FinetuneEstimateConfig, config.model_dump() | changed)
            costs = finetuning_costs(planning)
            planned.params = costs.trained
            if self.recipe.device:
                _note_memory(planned, max(stage.peak_bytes for stage in costs.stages()), cluster_of(planning))

    def _hardware(self, config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
        """The `estimate` section: the recipe's device, eight per machine, or else this machine."""
        workers = config.parallel.workers
        if self.recipe.device is None:
            return {"device": THIS_MACHINE, "devices_per_node": workers, "reached": CPU_REACHED}
        return {"device": self.recipe.device, "nodes": -(-workers // 8)}


def _note_memory(planned: PlannedStep, peak: float, cluster: Cluster) -> None:
    if peak > cluster.usable:
        device = cluster.device
        planned.notes.append(
            f"its fullest stage needs about {peak / 1e9:.0f} GB, and {device.name} has {device.memory_gb:g}; raise "
            "parallel.stages, or use train.recompute=full"
        )
