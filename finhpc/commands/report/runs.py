"""The runs in MLflow, sorted by what they are: settings, figures, and the runs they started from."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.commands.report.curves import Curve
from finhpc.errors import ConfigError
from finhpc.models.families.presets import PRESETS, Shape
from finhpc.models.families.registry import FAMILIES, resolve_shape
from finhpc.settings.base import marked
from finhpc.settings.pretrain import Model
from finhpc.settings.sweep import FinetuneSweepConfig, SweepConfig
from finhpc.tracking.tags import COMMAND, PARENT, PREFIX, SCORED_FROM, SETTING, SWEEP

if TYPE_CHECKING:
    from mlflow import MlflowClient

GENERAL, FINANCIAL = ("boolq", "piqa", "winogrande"), ("fpb", "fiqa_sa", "tfns")
SHAPE_KEYS = ("layers", "width", "heads", "kv_heads", "mlp_width", "context", "vocab_size")

# Settings that say where and how a run is computed, not what it trains.
PLACING = {*marked(SweepConfig, "may_change"), *marked(FinetuneSweepConfig, "may_change")}


@dataclass(frozen=True)
class Tracked:
    """One run of MLflow: settings (hidden tags) as text, and figures with the names of `result.json`."""

    id: str
    name: str
    status: str
    start_ms: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @staticmethod
    def of(run: Any) -> Tracked:
        info, data = run.info, run.data
        return Tracked(info.run_id, info.run_name, info.status, info.start_time or 0, data.metrics, data.tags)

    def setting(self, key: str) -> str | None:
        """The value as text; the newest one of a resumed run."""
        value = self.tags.get(SETTING + key)
        return None if value in (None, "None", "") else value

    def start(self, key: str) -> str | None:
        """What the workers reported at their newest start: workers, threads, device, ..."""
        return self.tags.get(f"{PREFIX}start.{key}")

    def whole(self, key: str) -> int | None:
        """A setting that is an integer."""
        value = self.setting(key)
        return int(value) if value is not None and re.fullmatch(r"\d+", value) else None

    def listed(self, key: str) -> Any:
        """A setting that is a list or a dictionary; an empty list if it is neither."""
        try:
            return ast.literal_eval(self.setting(key) or "[]")
        except (ValueError, SyntaxError):
            return []

    @property
    def verb(self) -> str | None:
        """pretrain, finetune or evaluate; None for anything else."""
        verb = self.tags.get(COMMAND)
        return verb if verb in ("pretrain", "finetune", "evaluate") else None

    def place(self, key: str) -> str | None:
        """The placement of the run: `stages`, `replicas`, `device` or `threads`."""
        return self.start(key) or self.setting(f"parallel.{key}") or self.setting(f"resources.{key}")

    @property
    def warm(self) -> bool:
        """Whether it trained in a process that a sweep reuses for its trials."""
        return SWEEP in self.tags

    @property
    def train_s(self) -> float | None:
        """The seconds of its steps at their median pace."""
        tokens, pace = self.metrics.get("tokens"), self.metrics.get("tokens_per_s")
        return tokens / pace if tokens and pace else None

    @property
    def complete(self) -> bool:
        """Finished with all its steps, or by its own patience: not failed, killed, or stopped by a scheduler."""
        steps, planned = self.metrics.get("steps"), self.whole("train.steps")
        short = steps is not None and planned is not None and steps < planned
        return self.status == "FINISHED" and (not short or self.whole("train.patience") is not None)

    @property
    def scored_only(self) -> bool:
        return SCORED_FROM in self.tags

    @cached_property
    def meaning(self) -> tuple[tuple[str, str], ...]:
        """Its settings except for the seed and the placement: equal for all seeds of an experiment."""
        named = {k.removeprefix(SETTING): v for k, v in self.tags.items() if k.startswith(SETTING)}
        kept = {key: value for key, value in named.items() if key not in PLACING}
        # A dense model has no ranks, even if a grid set them.
        dropped = {"train.seed", *(("method.rank", "method.ranks") if self.setting("method.kind") == "dense" else ())}
        return tuple(sorted((key, value) for key, value in kept.items() if key not in dropped))

    @property
    def model_folder(self) -> str | None:
        """The path of the model that it wrote, as later runs refer to it."""
        storage, name = self.setting("run.storage"), self.setting("run.name")
        return f"{storage.rstrip('/')}/{name}/model" if storage and name else None

    @property
    def memory_bytes(self) -> float | None:
        """The sum of its workers' peak bytes."""
        peaks = [v for k, v in self.metrics.items() if re.fullmatch(r"peak_memory_bytes(_worker\d+)?", k)]
        return sum(peaks) if peaks else None

    def size(self, bits: int) -> float | None:
        """Bytes of its model at these bits."""
        return self.metrics.get(f"size_{bits}bit_bytes", self.metrics.get("size_bytes"))

    def figure(self, task: str, name: str) -> float | None:
        """A figure that `finhpc evaluate` logged for a task."""
        return self.metrics.get(f"evaluate/{task}/{name}")

    def score(self, task: str, of: str = "") -> float | None:
        """Accuracy of a general task, weighted F1 of a financial one, in percent; the other one if it is missing.

        `of`: "_majority", "_ci95_low" or "_ci95_high" for the majority's score or an end of the interval.
        """
        for metric in ("acc", "weighted_f1") if task in GENERAL else ("weighted_f1", "acc"):
            if self.figure(task, metric) is not None:
                value = self.figure(task, metric + of)
                return None if value is None else 100 * value
        return None


@dataclass(frozen=True)
class Scale:
    """What runs must have in common to be compared: the model's size, the data, and the amount of training."""

    model: str
    params: int  # of the dense model, or the base
    data: str  # the shards' fingerprint, or the file names of the examples
    amount: int  # tokens of a pretraining, examples of a finetuning
    unit: str
    width: int | None = None
    layers: int | None = None

    @property
    def text(self) -> str:
        return f"{self.model} ({self.size}), {self.amount:,} {self.unit}"

    @property
    def size(self) -> str:
        shape = f"{self.layers} layers x {self.width} wide, " if self.layers and self.width else ""
        params = f"{self.params / 1e6:,.1f} M" if self.params >= 1e5 else f"{self.params:,}"
        return f"{shape}{params} parameters"


@dataclass
class Collected:
    """The runs of a report. `left_out`: reason -> number of runs that are in no table."""

    client: MlflowClient
    pretrained: list[Tracked] = field(default_factory=list)
    finetuned: list[Tracked] = field(default_factory=list)
    scored: list[Tracked] = field(default_factory=list)  # another run's model at other bits
    evaluations: list[Tracked] = field(default_factory=list)
    experiments: set[str] = field(default_factory=set)  # the ids of these runs' experiments
    left_out: Counter[str] = field(default_factory=Counter)

    @cached_property
    def makers(self) -> dict[str, Tracked]:
        """Model folder -> the newest run that wrote it."""
        return {run.model_folder: run for run in (*self.pretrained, *self.finetuned) if run.model_folder}

    def curves(self, runs: Sequence[Tracked], metric: str) -> list[Curve]:
        """A metric of each run at each step; the last value if a step was logged twice."""
        curves: list[Curve] = []
        for run in runs:
            points = sorted(self.client.get_metric_history(run.id, metric), key=lambda m: (m.step, m.timestamp))
            curves.append({point.step: float(point.value) for point in points})
        return curves

    def start_of(self, run: Tracked) -> Tracked | None:
        """The run that made its initial model, if MLflow has it."""
        path = run.tags.get(PREFIX + "started_from") or run.setting("model.path")
        return self.makers.get(path.rstrip("/")) if path else None

    def shape(self, run: Tracked) -> Shape | None:
        """The model's shape by its own settings or those of the run it starts from; None if neither is known."""
        seen: set[str] = set()
        while run.setting("model.path"):
            seen.add(run.id)
            start = self.start_of(run)
            if start is None or start.id in seen:
                return None
            run = start
        given = {key: value for key in SHAPE_KEYS if (value := run.whole(f"model.{key}")) is not None}
        try:
            return resolve_shape(Model(preset=run.setting("model.preset") or "", **given))
        except ConfigError:  # a preset of another version
            return None

    def scale(self, run: Tracked) -> Scale:
        """The scale that a run belongs to. Parameters are 0 if MLflow has none."""
        params, data = int(run.metrics.get("params_dense", 0)), run.tags.get(PREFIX + "dataset_fingerprint", "")[:12]
        if run.verb == "finetune":
            # The seed decides which examples are held out, and so changes the fingerprint.
            limit = run.setting("data.limit")
            data = ", ".join(Path(source).name for source in run.listed("data.source"))
            data += f" (at most {limit})" if limit else ""
            sizes = [run.whole(f"parallel.{key}") or 1 for key in ("micro_batch_size", "micro_batches", "replicas")]
            seen = int(run.metrics.get("steps", 0)) * sizes[0] * sizes[1] * sizes[2]
            start = self.start_of(run)
            base = start.name if start else _folder_name(run.setting("model.path"))
            return Scale(base, params, data, seen, "examples")
        shape = self.shape(run)
        amount = int(run.metrics.get("tokens", 0))
        if shape is None:
            return Scale(_folder_name(run.setting("model.path")), params, data, amount, "tokens")
        return Scale(_shape_name(shape), params, data, amount, "tokens", shape.width, shape.layers)


def collect(client: MlflowClient, runs: list[Any]) -> Collected:
    """Sort MLflow's runs by what they are."""
    found = Collected(client)
    tracked = [Tracked.of(run) for run in runs]
    parents = {run.tags.get(PARENT) for run in tracked}
    experiments = {run.info.run_id: run.info.experiment_id for run in runs}
    for run in tracked:
        if run.id in parents or (verb := run.verb) is None:
            found.left_out["runs of other kinds, such as a sweep's own"] += 1
        elif verb == "evaluate":
            found.evaluations.append(run)
        elif not run.complete:
            found.left_out["runs that did not finish, or stopped before their last step"] += 1
        elif run.scored_only:
            found.scored.append(run)
        else:
            (found.pretrained if verb == "pretrain" else found.finetuned).append(run)
    used = (*found.pretrained, *found.finetuned, *found.scored, *found.evaluations)
    found.experiments = {experiments[run.id] for run in used}
    return found


def _shape_name(shape: Shape) -> str:
    """The preset with these layers, width and heads, or else the family with its layers and width."""
    for name, preset in PRESETS.items():
        own, other = ((s.family, s.layers, s.width, s.heads, s.kv_heads, s.mlp_width) for s in (shape, preset))
        if own == other:
            return name
    return f"{FAMILIES[shape.family].label} {shape.layers} x {shape.width}"


def _folder_name(path: str | None) -> str:
    """The folder's name, or its parent's if it is called `model`."""
    folder = Path(path or "unknown")
    return folder.parent.name if folder.name in ("model", "adapter") and folder.parent.name else folder.name
