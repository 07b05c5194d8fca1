"""The training loop of one worker: steps, evaluations, checkpoints; resumes where the run stopped."""

from __future__ import annotations

import hashlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finhpc.log import redirected
from finhpc.models.initialize import Fill
from finhpc.models.lora.model import LoraModel
from finhpc.settings.finetune import FinetuneConfig, TrainingConfig
from finhpc.training import checkpoint
from finhpc.training.batches import BatchSource, Ints
from finhpc.training.checkpoint import Checkpointer
from finhpc.training.engine import Engine
from finhpc.training.journal import WORKER_FILE, Journal
from finhpc.training.memory import counted_peak, forget_peaks, peak_resident_bytes
from finhpc.training.optimizer import begin_at, learning_rate, moments, moments_of
from finhpc.training.stages import kept_cut
from finhpc.training.watchdog import Watchdog

log = logging.getLogger(__name__)

TIMES_EVERY = 10  # steps between sums of busy times over all workers


@dataclass
class Trainer:
    """One worker's whole training.

    `fill` gives the weights their first numbers; with `adapt` they are those of a frozen base.
    """

    config: TrainingConfig
    hf_config: Any
    fill: Fill | None
    device: torch.device
    folder: Path
    batches: BatchSource
    adapt: LoraModel | None = None
    consumed: int = 0  # sum of sample hashes this worker read, see `_consume`
    labels: dict[str, Any] = field(default_factory=dict)  # goes into every checkpoint's manifest
    on_eval: Callable[[dict[str, Any]], None] | None = None  # told of each evaluation but the last, on rank 0
    resumed_from: int = 0
    peak: int | None = None  # peak bytes, once counted
    attempt: str = ""  # differs between starts, the same on all workers
    _span: float = 0.0  # seconds of the steps since times were last summed

    def run(self) -> None:
        """Train to `train.steps`.

        Raises `NonFiniteError` on every worker when the loss is not finite, `CheckpointError` when no
        checkpoint can be written or none of those on disk is whole. Ends the process when nothing
        moves, see `finhpc.training.watchdog`.
        """
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.journal = Journal(self.folder / WORKER_FILE) if self.rank == 0 else None
        watchdog = Watchdog(self.folder, self.rank, self.config.train.hang_timeout_s, self._progress)
        # The driver shows what the first worker logs; all workers log much the same.
        with redirected(self._write_message if self.journal else None), watchdog as dog:
            self._run(dog)

    def _run(self, dog: Watchdog) -> None:
        self._set_up()
        self.started = time.perf_counter()
        if self.engine.step == self.config.train.steps:  # taken before: whatever was scored then is scored again
            self._evaluate(self.engine.step)
        for step in range(self.engine.step + 1, self.config.train.steps + 1):
            self._step(step)
            dog.settle()
            last = step == self.config.train.steps
            if last or _due(step, self.config.train.eval_every):
                self._evaluate(step)
            if last or _due(step, self.config.train.checkpoint_every):
                self._checkpoint(step)
        self.saver.wait()
        dist.barrier()
        self._finish()

    def _progress(self) -> tuple[object, ...]:
        """What moves as long as this worker does: passes through its stage, data read, checkpoints growing on disk."""
        engine: Engine | None = getattr(self, "engine", None)
        if engine is None:  # still being made
            return ()
        return (
            engine.step,
            engine.busy_s,
            engine.wait_s,
            checkpoint.newest_checkpoint_bytes(self.folder / "checkpoints"),
        )

    @property
    def step(self) -> int:
        """The last step taken."""
        engine: Engine | None = getattr(self, "engine", None)
        return engine.step if engine else 0

    # -- start ------------------------------------------------------------------------------

    def _set_up(self) -> None:
        forget_peaks(self.device)
        torch.manual_seed(self.config.train.seed * 1_000_003 + self.rank)
        borders = None  # of an adapted model: counted, the same at every start
        if not isinstance(self.config, FinetuneConfig):
            stages = self.folder / "stages.json"
            borders = kept_cut(self.config, self.hf_config, self.device, stages).borders
        self.engine = Engine(self.config, self.hf_config, self.device, borders, self.fill, self.adapt)
        checkpoints = self.folder / "checkpoints"
        plan: list[Any] = [None, None]
        if self.rank == 0:
            checkpoints.mkdir(parents=True, exist_ok=True)
            saved = checkpoint.latest_valid(checkpoints)
            if saved is None and any(checkpoints.glob("step_*")):
                log.info("no checkpoint was ever completed: the run begins at step 0 again.")
            checkpoint.remove_partial(checkpoints)
            plan = [uuid.uuid4().hex, saved]
        dist.broadcast_object_list(plan)
        self.attempt, saved = plan
        self.saver = Checkpointer(checkpoints, self.config.train.keep_checkpoints, self.attempt, self.rank, self.ranks)
        if saved is not None:
            self._load(saved)
        if self.journal:
            parallel = self.config.parallel
            self.journal.write(
                "start",
                step=self.engine.step,
                attempt=self.attempt,
                stages=parallel.stages,
                replicas=parallel.replicas,
                workers=self.ranks,
                threads=torch.get_num_threads(),
                device="cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
                val_samples=self.batches.scored,
            )
        self.micro_batches = self._micro_batches()
        dist.barrier()  # no worker's first step waits for another's data to be opened

    def _load(self, saved: checkpoint.Checkpoint) -> None:
        engine = self.engine
        engine.go_to(saved.step)
        named = engine.trained_parameters()
        begin_at(engine.optimizer, saved.step)
        targets = {name: {"param": p.data, **moments(engine.optimizer, p)} for name, p in named.items()}
        for prefix in ("param", *moments_of(engine.optimizer)):
            wanted = [name for name, target in targets.items() if prefix in target]
            for name, value in checkpoint.load_tensors(saved, wanted, prefix).items():
                targets[name][prefix].copy_(value)
        self.resumed_from = saved.step
        self.consumed = int(saved.manifest["consumed"], 16) if self.rank == 0 else 0
        if not checkpoint.load_random_state(saved, self.rank, self.ranks):
            torch.manual_seed(hash((self.config.train.seed, saved.step, self.rank)))
            config = self.config
            if config.lora.dropout if isinstance(config, FinetuneConfig) else config.model.dropout:
                log.info("the number of workers changed: dropout draws differ from an unbroken run's.")
        log.info(f"resumed from step {saved.step}")

    # -- data -------------------------------------------------------------------------------

    def _micro_batches(self) -> Iterator[Tensor]:
        """Tokens for the engine, in the run's order; counts what is consumed.

        The first micro-batch is read at once: opening the data belongs to the start, and is no wait of a step.
        """
        if self.engine.stage > 0 or self.engine.step >= self.config.train.steps:
            return iter(())
        stream = self.batches.stream(self.engine.step, self.engine.replica)
        first = list(islice(stream, 1))

        def inputs() -> Iterator[Tensor]:
            for batch in chain(first, stream):
                self._consume(batch.positions, batch.samples)
                yield batch.inputs

        return inputs()

    def _consume(self, positions: Ints, samples: Ints) -> None:
        """Add each sample's hash modulo 2^256.

        The sum says which sample was read at which place of the run, whoever read it: it is the
        same for any number of replicas and any number of interruptions.
        """
        for position, sample in zip(positions.tolist(), samples.tolist(), strict=True):
            self.consumed = (self.consumed + sample_hash(position, sample)) % 2**256

    # -- work -------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        config, engine = self.config, self.engine
        lr = learning_rate(config.optimizer, step, config.train.steps)
        begin = time.perf_counter()
        if step == self.resumed_from + 2 and self.device.type == "cpu":
            loss, self.peak = counted_peak(lambda: engine.train_step(self.micro_batches, lr))
        else:
            loss = engine.train_step(self.micro_batches, lr)
        step_s = time.perf_counter() - begin
        tokens = self.batches.tokens(step)
        record: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "train_loss": loss,
            "lr": lr,
            "grad_norm": engine.grad_norm,
            "step_s": step_s,
            "tokens_per_s": (tokens - self.batches.tokens(step - 1)) / step_s,
            "samples_per_s": config.parallel.samples_per_step / step_s,
        }
        if engine.alpha is not None:
            record["alpha"] = engine.alpha
        self._span += step_s
        if step % TIMES_EVERY == 0 or step == config.train.steps:
            record |= self._times()
        if self.journal:
            self.journal.write("train", **record)

    def _times(self) -> dict[str, float]:
        """Shares of the steps since the last call: workers computing, first stages waiting for data.

        `data_wait_fraction` is the time that first stages waited for micro-batches, over the time of those steps;
        opening the data after a start or a resume comes before the first step and counts in neither.
        """
        busy, wait = self.engine.take_times()
        sums = torch.tensor([busy, wait], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        span, self._span = self._span, 0.0
        return {
            "pipeline_utilization": sums[0].item() / (span * self.ranks),
            "data_wait_fraction": sums[1].item() / (span * self.config.parallel.replicas),
        }

    def _evaluate(self, step: int) -> None:
        times = self.engine.busy_s, self.engine.wait_s  # of training steps; evaluation must not count
        loss = held_out_loss(self.engine, self.batches)
        if loss is None:
            return
        self.engine.busy_s, self.engine.wait_s = times
        found = {"step": step, "tokens": self.batches.tokens(step), "val_loss": loss, "val_perplexity": _exp(loss)}
        if self.journal:
            self.journal.write("eval", **found)
        if self.on_eval and self.rank == 0 and step < self.config.train.steps:
            self.on_eval(found)

    def _checkpoint(self, step: int) -> None:
        engine = self.engine
        named = engine.trained_parameters()
        state: dict[str, Tensor] = {}
        writes = engine.replica == 0
        for name in engine.owned_names() if writes else ():
            kept = {"param": named[name].detach(), **moments(engine.optimizer, named[name])}
            state |= {f"{prefix}.{name}": value for prefix, value in kept.items()}
        extra = {
            **self.labels,
            "consumed": f"{self.consumed:064x}",
            "samples": step * self.config.parallel.samples_per_step,
            "stages": self.config.parallel.stages,
            "replicas": self.config.parallel.replicas,
        }
        self.saver.save(step, f"stage-{engine.stage:05d}.safetensors" if writes else None, state, extra)
        if self.journal:
            self.journal.write("checkpoint", step=step, path=f"checkpoints/step_{step:08d}")

    def _finish(self) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        mine = (self.peak, peak_resident_bytes(), self.engine.stage)
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine)
        if self.journal:
            self.journal.write(
                "memory",
                step=self.engine.step,
                peak_memory_bytes=[peak for peak, _, _ in everyone],
                peak_resident_bytes=[resident for _, resident, _ in everyone],
            )
            self.journal.write(
                "finished",
                step=self.engine.step,
                resumed_from_step=self.resumed_from,
                train_wall_s=time.perf_counter() - self.started,
            )

    def _write_message(self, text: str) -> None:
        assert self.journal is not None
        self.journal.write("message", text=text)


def held_out_loss(engine: Engine, feed: BatchSource) -> float | None:
    """Mean loss over every held-out sample, whatever the topology; None where nothing is held out.

    The engine takes whole micro-batches, equally many on each replica: copies of a sample fill them, and their
    share of the mean is taken out again.
    """
    batches = feed.held_out(engine.replica)
    if not batches:
        return None
    loss = engine.evaluate(iter(batches), len(batches))
    copies, filler = feed.filler()
    if filler is not None:
        loss += (loss - engine.evaluate(iter([filler]), 1)) * copies / feed.scored
    return loss


def sample_hash(position: int, sample: int) -> int:
    """sha256 of "position:sample id" as a number."""
    return int.from_bytes(hashlib.sha256(f"{position}:{sample}".encode()).digest(), "big")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else float("inf")
