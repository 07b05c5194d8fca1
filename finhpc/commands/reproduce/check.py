"""A reproduction before it starts: every step's settings checked as far as they can be, counted, and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from finhpc.cluster.connect import check_fits, use_cuda
from finhpc.commands.estimate.pretraining import checked
from finhpc.commands.reproduce.recipe import AbsentError, Tree, inputs_of, merged, resolve, step_config
from finhpc.commands.reproduce.verbs import expected_result
from finhpc.errors import ConfigError, collect
from finhpc.lowrank.registry import SVD
from finhpc.planning.costs import PretrainCosts
from finhpc.planning.devices import CPU_REACHED, DEVICES, REACHED, THIS_MACHINE, Cluster, Device, this_machine
from finhpc.planning.memory import Scheme, Topology
from finhpc.planning.outline import outline_of
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import Section, build
from finhpc.settings.decompose import DecomposeConfig
from finhpc.settings.estimate import EstimateConfig, FinetuneEstimateConfig
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.prepare import PrepareConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.reproduce import HoldOutConfig, Recipe, ReproduceConfig, Step

DEVICES_A_NODE = 8
USABLE = 0.9  # of a device's memory, as estimate.usable
DONE = ("finished", "done")  # what verbs write as the status of a result


@dataclass
class Planned:
    """A step that is to come. `config`: its settings as far as known; None where it will not run, see `why`."""

    step: Step
    folder: Path
    config: Section | None = None
    why: str = ""
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    params: int | None = None
    tokens: int | None = None
    hours: float | None = None  # of the whole step, estimated
    workers: int | None = None  # of a training

    @property
    def finished(self) -> bool:
        """Whether its folder says so; the verb itself looks more closely."""
        try:
            return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))["status"] in DONE
        except (OSError, ValueError, KeyError):
            return False


class Checker:
    """Goes through the steps in order; what went wrong is in `problems`."""

    def __init__(self, study: ReproduceConfig, recipe: Recipe) -> None:
        self.study, self.recipe = study, recipe
        self.problems: list[str] = []
        self.known: Tree = {}
        self.pretrained: dict[str, PretrainConfig] = {}  # model folder -> the run that will make it
        self.vocab: dict[str, int] = {}  # shards that a tokeniser of that size is trained for
        self.reasons: dict[str, str] = {}  # step -> why it will not run
        self.coming: set[str] = set()  # folders that steps will make

    def plan(self) -> list[Planned]:
        with collect(self.problems):
            self.known |= inputs_of(self.study, self.recipe)
        return [self._planned(step) for step in self.recipe.steps]

    def _planned(self, step: Step) -> Planned:
        name = f"{self.study.run.name}-{step.name}"
        planned = Planned(step, RunFolder(self.study.run.storage, name).path)
        found: list[str] = []
        with collect(found):
            try:
                tree = resolve(merged(self.recipe, step), self.known, [])
                planned.config = step_config(self.study, step, tree)
            except AbsentError as absent:
                planned.why = self.reasons.get(absent.name, f"{absent.name} is not given")
        if planned.why:
            self.reasons[step.name] = planned.why
        if planned.config is not None:
            with collect(found):
                self._check(planned, planned.config)
            self.known[step.name] = expected_result(step.verb, planned.folder)
            self.coming.add(str(planned.folder))
        self.problems += [f"step {step.name}: {problem}" for problem in found]
        return planned

    def _check(self, planned: Planned, config: Section) -> None:
        match config:
            case PrepareConfig():
                self._prepare(planned, config)
            case PretrainConfig():
                self._pretrain(planned, config)
            case FinetuneConfig():
                self._finetune(planned, config)
            case EvaluateConfig():
                self._evaluate(planned, config)
            case DecomposeConfig():
                self._decompose(planned, config)
            case HoldOutConfig():
                self._hold_out(planned, config)

    def _prepare(self, planned: Planned, config: PrepareConfig) -> None:
        from finhpc.data.text import sources
        from finhpc.data.text.tokenizer import trained_size

        if (size := trained_size(config.tokenizer)) is not None:
            self.vocab[config.out] = size
        local = [source for source in config.source if not source.startswith("hf:")]
        planned.unchecked += [f"{source} (the hub)" for source in config.source if source not in local]
        if local or not config.source:
            sources.units(config.model_copy(update={"source": local}))

    def _pretrain(self, planned: Planned, config: PretrainConfig) -> None:
        """Shape, ranks, stages; of methods 2 and 3 those of the run whose model they start from."""
        start = config
        while start.model.path in self.pretrained:
            start = self.pretrained[start.model.path]
        model = start.model
        if model.path is None and model.vocab_size is None and config.data.shards in self.vocab:
            model = model.model_copy(update={"vocab_size": self.vocab[config.data.shards]})
        method = config.method
        if start is not config and method.kind == SVD:  # the ranks that scratch would be checked for
            method = method.model_copy(update={"kind": "low_rank"})
        self.pretrained[str(planned.folder / "model")] = config
        tree = config.model_dump() | {"model": model.model_dump(), "method": method.model_dump()}
        _count(planned, build(EstimateConfig, tree), self.recipe.device)

    def _finetune(self, planned: Planned, config: FinetuneConfig) -> None:
        from finhpc.commands.finetune import Finetune

        planned.workers = config.parallel.workers
        base = str(config.model.path)
        unknown = [f"{source} (the hub)" for source in config.data.source if source.startswith("hf:")]
        if self._is_coming(base):
            unknown.append("the base, which an earlier step makes")
        elif not Path(base).expanduser().exists():
            unknown.append(f"{base} (the hub)")
        planned.unchecked += unknown
        if base in self.recipe.shapes and not Path(base).exists():
            _count_adapters(planned, config, self.recipe.shapes[base], self.recipe.device)
        if not unknown:
            counts = Finetune(config).counts()
            planned.params = counts["params_trainable"]

    def _evaluate(self, planned: Planned, config: EvaluateConfig) -> None:
        from finhpc.evaluation.documents import SOURCES, documents
        from finhpc.evaluation.models import subjects

        for name in (*config.model, *config.adapter):
            if not self._is_coming(name):
                if Path(name).expanduser().exists():
                    subjects([name], [])
                else:
                    planned.unchecked.append(f"{name} (the hub)")
        for task in config.tasks:
            source = config.data.files.get(task, "")
            if source.startswith("hf:"):
                planned.unchecked.append(f"{source} (the hub)")
            elif task in SOURCES:
                documents(task, config.data, 1, config.seed)

    def _decompose(self, planned: Planned, config: DecomposeConfig) -> None:
        from finhpc.commands.decompose.command import decompose

        if self._is_coming(config.model):
            return
        if Path(config.model).expanduser().exists():
            decompose(config, dry_run=True)
        else:
            planned.unchecked.append(f"{config.model} (the hub)")

    def _hold_out(self, planned: Planned, config: HoldOutConfig) -> None:
        from finhpc.evaluation.hold_out import held_out_documents

        far = [source for source in config.source if source.startswith("hf:")]
        planned.unchecked += [f"{source} (the hub)" for source in far]
        if not far:
            held_out_documents(config)

    def _is_coming(self, path: str) -> bool:
        return any(path == folder or path.startswith(folder + "/") for folder in self.coming)


def check(study: ReproduceConfig, recipe: Recipe) -> list[Planned]:
    """Every step, checked; raises one `ConfigError` with every problem of all of them."""
    checker = Checker(study, recipe)
    planned = checker.plan()
    if checker.problems:
        raise ConfigError(checker.problems)
    return planned


def misplaced(planned: list[Planned], total: Mapping[str, float]) -> list[str]:
    """What the cluster that has `total` cannot place: each problem once, with the steps that have it."""
    found: dict[str, list[str]] = {}
    for one in planned:
        if isinstance(one.config, PretrainConfig | FinetuneConfig):
            problems: list[str] = []
            with collect(problems):
                check_fits(one.config, use_cuda(one.config, dict(total)), dict(total))
            for problem in problems:
                found.setdefault(problem, []).append(one.step.name)
    return [f"{', '.join(names)}: {problem}" for problem, names in found.items()]


def _count(planned: Planned, config: EstimateConfig, device: str | None) -> None:
    """Parameters, tokens and hours of a pretraining, once nothing is wrong with its shape."""
    hf_config, _ = checked(config)
    outline = outline_of(hf_config, config.data.seq_len, config.train.recompute)
    topology, precision = Topology.of(config), config.train.precision
    hardware = DEVICES[device] if device else _this_machine(config.resources.threads)
    nodes = -(-topology.workers // DEVICES_A_NODE)
    memory = hardware.memory_gb * 1e9
    cluster = Cluster(hardware, nodes, DEVICES_A_NODE, memory, REACHED if device else CPU_REACHED, precision)
    costs = PretrainCosts.of(outline, Scheme.of(config, cuda=device is not None), topology)
    _note_memory(planned, costs.fullest.peak_bytes, hardware)
    planned.params, planned.workers = outline.params, topology.workers
    planned.tokens = config.train.steps * config.parallel.samples_per_step * config.data.seq_len
    planned.hours = config.train.steps * costs.pace(cluster).step_s / 3600


def _count_adapters(planned: Planned, config: FinetuneConfig, preset: str, device: str | None) -> None:
    """Trained parameters of a finetuning, and whether the base of that shape fits; its examples are not looked at."""
    from finhpc.commands.estimate.finetuning import checked as checked_finetuning
    from finhpc.commands.estimate.finetuning import pack_of
    from finhpc.planning.finetuning import LoraCosts

    tree = config.model_dump() | {"model": {"preset": preset}, "estimate": {"device": device or THIS_MACHINE}}
    planning = build(FinetuneEstimateConfig, tree)
    _, lora_model = checked_finetuning(planning)
    plan = LoraCosts(lora_model, pack_of(planning), Topology.of(config), device is not None)
    planned.params = plan.trained
    if device:
        _note_memory(planned, max(stage.peak_bytes for stage in plan.stages()), DEVICES[device])


def _note_memory(planned: Planned, peak: float, device: Device) -> None:
    if peak > USABLE * device.memory_gb * 1e9:
        planned.notes.append(
            f"its fullest stage takes about {peak / 1e9:.0f} GB, and {device.name} has {device.memory_gb:g}; raise "
            "parallel.stages, or use train.recompute=full"
        )


@cache
def _this_machine(threads: int) -> Device:
    return this_machine(1, threads)


def rows_of(planned: list[Planned]) -> list[dict[str, Any]]:
    """A row a step, for the table before the start and the dry run's result."""
    return [
        {
            "step": one.step.name,
            "verb": one.step.verb,
            "state": "left out" if one.config is None else "finished" if one.finished else "to do",
            "params": one.params,
            "tokens": one.tokens,
            "workers": one.workers,
            "hours": one.hours,
            "why": one.why,
            "unchecked": one.unchecked,
            "notes": one.notes,
        }
        for one in planned
    ]
