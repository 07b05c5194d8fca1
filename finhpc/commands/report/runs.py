"""The runs that MLflow holds, each found by what it is: its settings, its figures, and what it started from."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.errors import ConfigError
from finhpc.models.families.presets import PRESETS, Shape, resolve_shape
from finhpc.settings.base import marked
from finhpc.settings.pretrain import Model
from finhpc.settings.sweep import FinetuneSweepConfig, SweepConfig
from finhpc.tracking.shown import HIDDEN, PARENT, SCORED_FROM, SETTING, SWEEP

if TYPE_CHECKING:
    from mlflow import MlflowClient

FAMILIES = {"gpt2": "GPT-2", "llama": "Llama"}
GENERAL, FINANCIAL = ("boolq", "piqa", "winogrande"), ("fpb", "fiqa_sa", "tfns")
SHAPE_KEYS = ("layers", "width", "heads", "kv_heads", "mlp_width", "context", "vocab_size")
Curve = dict[int, float]  # step -> loss in nats

# Settings that say where and how a run is computed, not what it trains.
PLACING = {*marked(SweepConfig, "may_change"), *marked(FinetuneSweepConfig, "may_change")}


@dataclass(frozen=True)
class Tracked:
    """One run of MLflow: settings (its hidden tags) as text, figures by the names of `result.json`."""

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
        """Its value as text; of a resumed run, the newest."""
        value = self.tags.get(SETTING + key)
        return None if value in (None, "None", "") else value

    def start(self, key: str) -> str | None:
        """What its workers reported at their newest start: workers, threads, device, ..."""
        return self.tags.get(f"{HIDDEN}start.{key}")

    def whole(self, key: str) -> int | None:
        """A setting that is a whole number."""
        value = self.setting(key)
        return int(value) if value is not None and re.fullmatch(r"\d+", value) else None

    def listed(self, key: str) -> Any:
        """A setting that is a list or a dictionary; an empty list where it is neither."""
        try:
            return ast.literal_eval(self.setting(key) or "[]")
        except (ValueError, SyntaxError):
            return []

    @property
    def verb(self) -> str | None:
        """pretrain, finetune or evaluate; None for anything else."""
        verb = self.tags.get(HIDDEN + "verb")
        return verb if verb in ("pretrain", "finetune", "evaluate") else None

    def place(self, key: str) -> str | None:
        """Where it ran: `stages`, `replicas`, `device` or `threads`."""
        return self.start(key) or self.setting(f"parallel.{key}") or self.setting(f"resources.{key}")

    @property
    def warm(self) -> bool:
        """Whether it trained in a process that a sweep keeps for its trials."""
        return SWEEP in self.tags

    @property
    def train_s(self) -> float | None:
        """Seconds that its steps took, at their median pace."""
        tokens, pace = self.metrics.get("tokens"), self.metrics.get("tokens_per_s")
        return tokens / pace if tokens and pace else None

    @property
    def complete(self) -> bool:
        """Finished with all its steps: not failed, killed, or stopped early by a scheduler."""
        steps, asked = self.metrics.get("steps"), self.whole("train.steps")
        return self.status == "FINISHED" and not (steps is not None and asked is not None and steps < asked)

    @property
    def scored_only(self) -> bool:
        return SCORED_FROM in self.tags

    @cached_property
    def meaning(self) -> tuple[tuple[str, str], ...]:
        """Its settings but the seed and those that only place it: equal for the seeds of one experiment."""
        named = {k.removeprefix(SETTING): v for k, v in self.tags.items() if k.startswith(SETTING)}
        kept = {key: value for key, value in named.items() if key not in PLACING}
        # A dense model has no ranks, whatever a grid of them gave it.
        dropped = {"train.seed", *(("method.rank", "method.ranks") if self.setting("method.kind") == "dense" else ())}
        return tuple(sorted((key, value) for key, value in kept.items() if key not in dropped))

    @property
    def made(self) -> str | None:
        """The path of the model folder that it left, as later runs name it."""
        storage, name = self.setting("run.storage"), self.setting("run.name")
        return f"{storage.rstrip('/')}/{name}/model" if storage and name else None

    @property
    def memory_bytes(self) -> float | None:
        """Peak bytes of all its workers together."""
        peaks = [v for k, v in self.metrics.items() if re.fullmatch(r"peak_memory_bytes(_worker\d+)?", k)]
        return sum(peaks) if peaks else None

    def figure(self, task: str, name: str) -> float | None:
        """What `finhpc evaluate` logged of a task."""
        return self.metrics.get(f"evaluate/{task}/{name}")

    def score(self, task: str, of: str = "") -> float | None:
        """Accuracy of a general task, weighted F1 of a financial one, in percent; the other where it has but that.

        `of`: _majority or an end of its interval, _ci95_low or _ci95_high, in place of the score itself.
        """
        for metric in ("acc", "weighted_f1") if task in GENERAL else ("weighted_f1", "acc"):
            if self.figure(task, metric) is not None:
                value = self.figure(task, metric + of)
                return None if value is None else 100 * value
        return None


@dataclass(frozen=True)
class Scale:
    """What must be equal for runs to be compared: the model's size, the data and how much of it was trained on."""

    model: str
    params: int  # of the dense model, or the base
    data: str  # the shards' fingerprint, or the names of the examples' files
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
    """What a report is made from. `left_out`: why -> number of runs that no table holds."""

    client: MlflowClient
    pretrained: list[Tracked] = field(default_factory=list)
    finetuned: list[Tracked] = field(default_factory=list)
    scored: list[Tracked] = field(default_factory=list)  # another run's model at other bits
    evaluations: list[Tracked] = field(default_factory=list)
    experiments: set[str] = field(default_factory=set)  # ids of those that these runs are in
    left_out: Counter[str] = field(default_factory=Counter)

    @cached_property
    def makers(self) -> dict[str, Tracked]:
        """Model folder -> the run that left it there; the newest of several."""
        return {run.made: run for run in (*self.pretrained, *self.finetuned) if run.made}

    def curve(self, run: Tracked, metric: str) -> Curve:
        """A metric at each step; the last value where a step was told twice."""
        points = sorted(self.client.get_metric_history(run.id, metric), key=lambda m: (m.step, m.timestamp))
        return {point.step: float(point.value) for point in points}

    def start_of(self, run: Tracked) -> Tracked | None:
        """The run that made the model it starts from, where MLflow holds it."""
        path = run.tags.get(HIDDEN + "started_from") or run.setting("model.path")
        return self.makers.get(path.rstrip("/")) if path else None

    def shape(self, run: Tracked) -> Shape | None:
        """The model's shape: its own settings', or those of the run it starts from; None where neither is known."""
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
        """Where a run belongs. Parameters are 0 where MLflow holds none."""
        params, data = int(run.metrics.get("params_dense", 0)), run.tags.get(HIDDEN + "dataset_fingerprint", "")[:12]
        if run.verb == "finetune":
            # Which examples are held out depends on the seed, and so does their fingerprint.
            limit = run.setting("data.limit")
            data = ", ".join(Path(source).name for source in run.listed("data.source"))
            data += f" (at most {limit})" if limit else ""
            sizes = [run.whole(f"parallel.{key}") or 1 for key in ("micro_batch_size", "micro_batches", "replicas")]
            seen = int(run.metrics.get("steps", 0)) * sizes[0] * sizes[1] * sizes[2]
            return Scale(self.base_name(run), params, data, seen, "examples")
        shape = self.shape(run)
        amount = int(run.metrics.get("tokens", 0))
        if shape is None:
            return Scale(_folder_name(run.setting("model.path")), params, data, amount, "tokens")
        return Scale(_shape_name(shape), params, data, amount, "tokens", shape.width, shape.layers)

    def base_name(self, run: Tracked) -> str:
        """The base of a finetuning: the run that made it, or its folder."""
        start = self.start_of(run)
        return start.name if start else _folder_name(run.setting("model.path"))


def collect(client: MlflowClient, runs: list[Any]) -> Collected:
    """Sort MLflow's runs by what they are."""
    found = Collected(client)
    tracked = [Tracked.of(run) for run in runs]
    parents = {run.tags.get(PARENT) for run in tracked}
    where = {run.info.run_id: run.info.experiment_id for run in runs}
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
    found.experiments = {where[run.id] for run in used}
    return found


def _shape_name(shape: Shape) -> str:
    """The preset of these layers, width and heads, or the family with its layers and width."""
    for name, preset in PRESETS.items():
        own, other = ((s.family, s.layers, s.width, s.heads, s.kv_heads, s.mlp_width) for s in (shape, preset))
        if own == other:
            return name
    return f"{FAMILIES.get(shape.family, shape.family)} {shape.layers} x {shape.width}"


def _folder_name(path: str | None) -> str:
    """A folder's own name, or the one above where it is called `model`."""
    folder = Path(path or "unknown")
    return folder.parent.name if folder.name in ("model", "adapter") and folder.parent.name else folder.name
