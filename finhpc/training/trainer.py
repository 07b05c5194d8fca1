"""The training loop of one worker: steps, evaluations, checkpoints; it resumes where the run stopped.

One training step, from its data to the journal:

    batches.py      Batch(inputs, samples, positions)            first stages only
        |           Trainer._open_data adds each sample's hash to `consumed`
        v
    engine.py       Engine.train_step sets the learning rate and method 3's alpha; DeepSpeed's schedule then runs
        |           forward, send, receive, backward for each micro-batch:
        |               models/pipeline.py   PipelineLayer, the parts of this stage
        |               models/families/     attention, MLP, ..., and the loss in the last part
        |           workers/replicas.py averages gradients over the replicas, and every worker receives the mean loss
        |           Engine._before_step clips by the norm over all stages and decays products
        v
    optimizers/     AdamW, or another one of OPTIMIZERS; with parallel.shard_optimizer on this replica's share alone
        |
        v
    journal.py      {"kind": "train", "step": ..., "train_loss": ...} in RUN/journal.jsonl, which the progress bar
                    and MLflow read at their own pace

Then watchdog.py learns that the start is over, and checkpoint.py copies the state for a thread that writes it. At the
start, workers/resume.py finds the checkpoint to resume from.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from finhpc.log import redirected
from finhpc.models.families.registry import family_of, skeleton
from finhpc.models.initialize import Fill
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import TrainingConfig
from finhpc.training import checkpoint, held_out
from finhpc.training.batches import Batch, BatchSource
from finhpc.training.checkpoint import Checkpoint, Checkpointer
from finhpc.training.compiler import run_operations
from finhpc.training.engine import Engine
from finhpc.training.journal import WORKER_FILE, Journal
from finhpc.training.memory import counted_peak, peak_resident_bytes, reset_peaks
from finhpc.training.metrics import Metrics
from finhpc.training.optimizers.schedules import learning_rate
from finhpc.training.stages import saved_cut
from finhpc.training.watchdog import Watchdog
from finhpc.training.workers.resume import latest_valid, load_state, stored_state
from finhpc.training.workers.stop import Stop

if TYPE_CHECKING:
    from finhpc.models.lora.model import LoraModel
    from finhpc.training.finetuning.best import Best

log = logging.getLogger(__name__)

Evaluate = Callable[[Engine, Any], dict[str, float] | None]  # (engine, source) -> figures; None: nothing is held out
Begin = Callable[[Engine], None]

TIMES_EVERY = 10  # steps between sums of busy times over all workers


class UnreadStep(NamedTuple):
    """A step without a record yet; `begin`: `time.perf_counter()` before it."""

    metrics: Metrics
    lr: float
    alpha: float | None
    begin: float


@dataclass
class Trainer:
    """One worker's training from its start to its end.

    `fill` sets the initial weights; with `lora_model` the weights are those of a frozen base, and adapters are
    trained. `labels` go into the manifest of every checkpoint. All of `begin` are called before the first step of a
    run. With `best`, the checkpoint of the best evaluation is kept, and the run may stop early. `evaluate` returns an
    evaluation's figures. `on_eval` is called on rank 0 after each evaluation except the last.
    """

    config: TrainingConfig
    hf_config: Any
    fill: Fill | None
    device: torch.device
    folder: Path
    source: BatchSource
    lora_model: LoraModel | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    begin: Sequence[Begin] = ()
    best: Best | None = None
    evaluate: Evaluate = held_out.evaluate
    on_eval: Callable[[dict[str, Any]], None] | None = None

    # Set by `run` and `_set_up`.
    world_rank: int = field(init=False)
    workers: int = field(init=False)
    journal: Journal | None = field(init=False)  # on rank 0
    engine: Engine = field(init=False)
    checkpointer: Checkpointer = field(init=False)
    stop: Stop = field(init=False)
    inputs: Iterator[Tensor] = field(init=False)  # of the engine
    started: float = field(init=False)
    is_set_up: bool = field(init=False, default=False)
    attempt: str = field(init=False, default="")  # differs between starts, the same on all workers
    resumed_from: int = field(init=False, default=0)

    # Changes from step to step.
    consumed: int = field(init=False, default=0)  # the sum of sample hashes that this worker read, see `_open_data`
    peak: int | None = field(init=False, default=None)  # peak bytes, once counted
    _verified: int = field(init=False, default=0)  # rounds in which workers verified a checkpoint
    _unread: UnreadStep | None = field(init=False, default=None)
    _seen: float = field(init=False, default=0.0)  # when the last metrics were read
    _span: float = field(init=False, default=0.0)  # seconds of the steps since times were last summed

    def run(self) -> None:
        """Train to `train.steps`, or until the command asks to stop, which `finhpc.training.workers.stop` explains.

        Raises `NonFiniteError` on every worker if the loss is not finite, `CheckpointError` if no checkpoint can be
        written or all those on disk are damaged. Ends the process if nothing progresses, see
        `finhpc.training.watchdog`.
        """
        self.world_rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.journal = Journal(self.folder / WORKER_FILE) if self.world_rank == 0 else None
        watchdog = Watchdog(self.folder, self.world_rank, self.config.train.hang_timeout_s, self._progress)
        # The driver shows what the first worker logs; all workers log much the same.
        journal = self.journal
        with redirected((lambda text: journal.write("message", text=text)) if journal else None), watchdog:
            self._set_up()
            self._train(watchdog)

    def _train(self, watchdog: Watchdog) -> None:
        train = self.config.train
        self.started = time.perf_counter()
        if self._is_over:  # resumed after the last step: its evaluation may be missing
            self._evaluate(self.engine.step)
        while not self._is_over:
            step = self.engine.step + 1
            self._step(step)
            watchdog.settle()
            stops, improved = self.stop.is_due(step), False
            if step == train.steps or _is_due(step, train.eval_every):
                improved = self._evaluate(step)
            if self._is_over or stops or improved or _is_due(step, train.checkpoint_every):
                self._checkpoint(step)
            if stops:
                break
        self.checkpointer.wait()
        dist.barrier()
        if self._is_over:
            self._finish()

    @property
    def _is_over(self) -> bool:
        """Whether no step is left to take."""
        return self.engine.step >= self.config.train.steps or (self.best is not None and self.best.stops)

    @property
    def step(self) -> int:
        """The last completed step."""
        return self.engine.step if self.is_set_up else 0

    def _progress(self) -> tuple[object, ...]:
        """Values that change while this worker makes progress: passes, data read, bytes of checkpoints on disk."""
        if not self.is_set_up:
            return ()
        written = checkpoint.newest_checkpoint_bytes(self.folder / "checkpoints")
        return self.engine.step, self.engine.times.passes, self.engine.wait_s, written, self._verified

    def _count_verified(self) -> None:
        self._verified += 1

    # -- start ------------------------------------------------------------------------------

    def _set_up(self) -> None:
        """Build the engine, resume from the latest checkpoint, and open the data."""
        reset_peaks(self.device)
        torch.manual_seed(self.config.train.seed * 1_000_003 + self.world_rank)
        borders = None  # counted by the engine for a LoRA model, with the same result at every start
        if isinstance(self.config, PretrainConfig):
            borders = saved_cut(self.config, self.hf_config, self.device, self.folder / "stages.json").borders
        self.engine = Engine(
            self.config, self.hf_config, self.device, borders, self.fill, self.lora_model, self._operations()
        )
        self.is_set_up = True
        folder = self.folder / "checkpoints"
        latest = latest_valid(folder, self.world_rank, self.workers, self._count_verified)
        attempt: list[Any] = [uuid.uuid4().hex]
        if self.world_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if latest is None and any(folder.glob("step_*")):
                log.info("no checkpoint was ever completed: the run begins at step 0 again.")
            checkpoint.remove_partial(folder)
        dist.broadcast_object_list(attempt)
        [self.attempt] = attempt
        self.checkpointer = Checkpointer(
            folder, self.config.train.keep_checkpoints, self.attempt, self.world_rank, self.workers
        )
        self.engine.before_update = self.checkpointer.wait_for_copy
        self.stop = Stop(self.folder, self.world_rank, self.attempt)
        if latest is not None:
            self._load(latest)
        else:
            for begin in self.begin:
                begin(self.engine)
        if self.journal:
            parallel = self.config.parallel
            self.journal.write(
                "start",
                step=self.engine.step,
                attempt=self.attempt,
                stages=parallel.stages,
                replicas=parallel.replicas,
                workers=self.workers,
                threads=torch.get_num_threads(),
                device="cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
                val_samples=self.source.scored,
            )
        self.inputs = self._open_data()
        dist.barrier()  # no worker's first step waits for another to open its data

    def _operations(self) -> float:
        """Roughly the operations of the run on this worker, by which it decides to compile; 0 if it cannot."""
        if self.lora_model and family_of(self.hf_config).whole_layers:
            return 0.0
        model = self.lora_model.weights.skeleton if self.lora_model else skeleton(self.hf_config)
        tokens = self.source.tokens(self.config.train.steps)
        return run_operations(model, tokens, frozen=self.lora_model is not None) / self.workers

    def _load(self, latest: Checkpoint) -> None:
        """Load weights, moments, counters and random state."""
        config = self.config
        load_state(self.engine, latest)
        self.resumed_from = latest.step
        self.consumed = int(latest.manifest["consumed"], 16) if self.world_rank == 0 else 0
        if self.best is not None:
            self.best.resume(latest, self.workers)
        if not checkpoint.load_random_state(latest, self.world_rank, self.workers):
            torch.manual_seed(hash((config.train.seed, latest.step, self.world_rank)))
            if config.model.dropout if isinstance(config, PretrainConfig) else config.lora.dropout:
                log.info("the number of workers changed: dropout draws differ from an unbroken run's.")
        log.info(f"resumed from step {latest.step}")

    def _open_data(self) -> Iterator[Tensor]:
        """The engine's inputs in the run's order.

        The first micro-batch is read immediately, so that the time to open the data counts as part of the start.
        Each sample's hash is added to `consumed`, modulo 2^256. The sum shows which sample was read at which position
        of the run, by any worker: it does not depend on the number of replicas and interruptions.
        """
        if self.engine.stage > 0 or self._is_over:
            return iter(())
        stream = self.source.stream(self.engine.step, self.engine.replica)
        first = list(islice(stream, 1))

        def count(batch: Batch) -> Tensor:
            for position, sample in zip(batch.positions.tolist(), batch.samples.tolist(), strict=True):
                self.consumed = (self.consumed + sample_hash(position, sample)) % 2**256
            return batch.inputs

        return map(count, chain(first, stream))

    # -- work -------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        """Take a step. On a GPU its metrics are read during the next one, so that the GPU never waits for the host."""
        lr = learning_rate(self.config.optimizer, step, self.config.train.steps)
        begin = time.perf_counter()
        # Peak memory is counted in the second step of a start, when moments and buffers exist.
        if step == self.resumed_from + 2 and self.device.type == "cpu":
            metrics, self.peak = counted_peak(lambda: self.engine.start_step(self.inputs, lr))
        else:
            metrics = self.engine.start_step(self.inputs, lr)
        self._record()
        self._unread = UnreadStep(metrics, lr, self.engine.alpha, begin)
        if self.device.type == "cpu" or step % TIMES_EVERY == 0:
            self._record()

    def _record(self) -> None:
        """Read the metrics of the last step and write its record, unless that is done; raises `NonFiniteError`.

        Evaluations and checkpoints begin with this, so that nothing is scored or saved that was not read.
        """
        if self._unread is None:
            return
        (metrics, lr, alpha, begin), self._unread = self._unread, None
        step, (loss, grad_norm) = metrics.step, metrics.read()
        # Steps follow one another: on a GPU one begins when the step before has ended, which was seen last.
        end = time.perf_counter()
        step_s, self._seen = end - max(begin, self._seen), end
        tokens = self.source.tokens(step)
        record: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "train_loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_s": step_s,
            "tokens_per_s": (tokens - self.source.tokens(step - 1)) / step_s,
            "samples_per_s": self.config.parallel.samples_per_step / step_s,
        }
        if alpha is not None:
            record["alpha"] = alpha
        self._span += step_s
        if step % TIMES_EVERY == 0 or step == self.config.train.steps:
            record |= self._take_times()
        if self.journal:
            self.journal.write("train", **record)

    def _take_times(self) -> dict[str, float]:
        """Shares of the steps since the last call: of workers computing, and of first stages waiting for data.

        Opening the data after a start or a resume comes before the first step and counts in neither.
        """
        busy, wait = self.engine.take_times()
        sums = torch.tensor([busy, wait], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        span, self._span = self._span, 0.0
        return {
            "pipeline_utilization": sums[0].item() / (span * self.workers),
            "data_wait_fraction": sums[1].item() / (span * self.config.parallel.replicas),
        }

    def _evaluate(self, step: int) -> bool:
        """Score and record the model; returns whether it is the best so far of a run that keeps the best."""
        self._record()
        figures = self.evaluate(self.engine, self.source)
        if figures is None:
            return False
        record = {"step": step, "tokens": self.source.tokens(step), **figures}
        if self.journal:
            self.journal.write("eval", **record)
        if self.on_eval and self.world_rank == 0 and step < self.config.train.steps:
            self.on_eval(record)
        return self.best is not None and self.best.improves(record)

    def _checkpoint(self, step: int) -> None:
        self._record()
        engine, parallel = self.engine, self.config.parallel
        state = stored_state(engine)
        extra = {
            **self.labels,
            "consumed": f"{self.consumed:064x}",
            "samples": step * parallel.samples_per_step,
            "stages": parallel.stages,
            "replicas": parallel.replicas,
            **(self.best.labels if self.best else {}),
        }
        file = f"stage-{engine.stage:05d}-replica-{engine.replica:05d}.safetensors"
        self.checkpointer.save(step, file if state else None, state, extra)
        if self.journal:
            self.journal.write("checkpoint", step=step, path=f"checkpoints/step_{step:08d}")

    def _finish(self) -> None:
        """Gather every worker's peak memory and write the last records."""
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        everyone: list[Any] = [None] * self.workers
        dist.all_gather_object(everyone, (self.peak, peak_resident_bytes()))
        if self.journal:
            self.journal.write(
                "memory",
                step=self.engine.step,
                peak_memory_bytes=[peak for peak, _ in everyone],
                peak_resident_bytes=[resident for _, resident in everyone],
            )
            self.journal.write(
                "finished",
                step=self.engine.step,
                resumed_from_step=self.resumed_from,
                train_wall_s=time.perf_counter() - self.started,
            )


def sample_hash(position: int, sample: int) -> int:
    """sha256 of "position:sample id" as a number."""
    return int.from_bytes(hashlib.sha256(f"{position}:{sample}".encode()).digest(), "big")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
