"""The engine of every topology: a DeepSpeed pipeline of stages x replicas.

Weights, gradients and AdamW's moments are float32; `bf16` runs the parts under autocast. DeepSpeed moves activations;
`finhpc.training.workers.replicas` averages gradients. Clipping is done here, by the norm over all stages, because
DeepSpeed's own norm is wrong with more than one stage in float32.

This file and `finhpc.training.workers.pipeline` alone use DeepSpeed, and these places depend on its internals:

- `CutPipeline` sets the borders between stages,
- `Engine._patch_deepspeed` changes instructions of its schedule,
- `Engine._free_losses` drops what it stores between steps,
- `process_group` clears its global state.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from io import StringIO
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime.pipe import schedule
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from finhpc.lowrank.blend import alpha_at, blend_in, set_alpha
from finhpc.lowrank.dlr import keep_residual
from finhpc.lowrank.registry import BLEND
from finhpc.models.derived import set_derived
from finhpc.models.families.registry import skeleton as make_skeleton
from finhpc.models.initialize import Fill, random_fill
from finhpc.models.packing.layout import pack_on
from finhpc.models.pipeline import PipelineLayer, is_tied, parts_of, residual_layers, stored_by_inputs
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import TrainingConfig
from finhpc.training.allocator import keep_freed_memory
from finhpc.training.compiler import Compiler
from finhpc.training.metrics import Metrics, check_finite
from finhpc.training.optimizers.decay import decay_products
from finhpc.training.optimizers.kind import layer_of
from finhpc.training.optimizers.stage import drop_parameters, elementwise, make_optimizer, set_lr
from finhpc.training.stages import measured_cut
from finhpc.training.workers.pipeline import Exchange, PassTimes, make_pipeline
from finhpc.training.workers.replicas import GradientAverager, ShardedStep, divide

if TYPE_CHECKING:
    from finhpc.models.lora.model import LoraModel

log = logging.getLogger(__name__)


class Engine:
    """A model in training on this process's stage.

    The process group must exist, with stages x replicas processes. Stage i has the parts borders[i] to
    borders[i + 1] - 1; by default the parts are measured and balanced. `stage` is this worker's place in the pipeline;
    with dualpipev it has stage i and its mirror image. `fill` sets the initial weights, which are
    random by default. With `lora_model` the model is its frozen base, only adapters are trained, and the inputs are
    packs, which may differ in length, instead of tokens. `operations` are those of the whole run on this worker, by
    which `train.compile=auto` decides. `alpha` is method 3's in the last step, else None.
    """

    def __init__(
        self,
        config: TrainingConfig,
        hf_config: Any,
        device: torch.device,
        borders: list[int] | None = None,
        fill: Fill | None = None,
        lora_model: LoraModel | None = None,
        operations: float = 0.0,
    ) -> None:
        self.config, self.hf_config, self.device = config, hf_config, device
        packed = lora_model is not None
        graphs = not packed and _waits_for_launches(config, hf_config)
        self.compiler = Compiler(config.train.compile, device, operations, packed, graphs)
        if device.type == "cpu":
            keep_freed_memory()
        parallel = config.parallel
        # An operator for inference, which would take a minute to compile.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        if lora_model is not None:
            self.borders = borders or lora_model.borders(parallel.stages)
            parts = lora_model.parts(self.compiler)
            specs = [LayerSpec(lora_model.layer_class, part, lora_model, device) for part in parts]
        else:
            assert isinstance(config, PretrainConfig)
            self.borders = borders or measured_cut(config, hf_config, device).borders
            specs = self._layers(config, fill or random_fill(hf_config, config.train.seed, config.method.init))
        with redirect_stdout(StringIO()):  # where DeepSpeed prints its topology and seeds
            pipeline = make_pipeline(specs, self.borders, parallel, dynamic_shape=lora_model is not None)
        self.layers = [module for module in pipeline.modules() if isinstance(module, PipelineLayer)]
        self._divide(pipeline.mpu())
        self.optimizer = make_optimizer(self.updated, config.optimizer, self._shapes(), stored_by_inputs(self.layers))
        dlr = isinstance(config, PretrainConfig) and config.method.init == "dlr"
        self._residuals = residual_layers(self.layers) if dlr else {}
        self.optimizer.register_step_pre_hook(self._before_step)
        self.optimizer.register_step_post_hook(self._after_step)
        self.pipe, *_ = deepspeed.initialize(
            model=pipeline,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": parallel.micro_batch_size,
                "gradient_accumulation_steps": parallel.micro_batches,
                "gradient_clipping": 0.0,
                "steps_per_print": 2**31,
                "zero_optimization": {"stage": 0},
                "timers": {"throughput": {"enabled": False}},  # it synchronizes with the device in every pass
            },
        )
        self.pipe.timers = NoopTimer()  # it would store two events of each step
        self.alpha: float | None = None
        self.averager: GradientAverager | None = None  # with several replicas
        self.set_step(0)
        self.packs = lora_model is not None
        self.grad_norm = float("nan")  # of the last step of `train_step`
        self._norm = torch.zeros((), dtype=torch.float64, device=device)
        self.times = PassTimes(device)
        self.wait_s = 0.0  # waiting for data, since `take_times`
        self.before_update: Callable[[], None] | None = None  # called in each step before the weights change
        self.exchange = Exchange()
        self._average_gradients()
        self._patch_deepspeed()

    def _divide(self, grid: Any) -> None:
        """Divide the stage's trained parameters among its replicas.

        Each replica writes its share into checkpoints. With `parallel.shard_optimizer` it also updates that share
        alone: `updated` has the parameters of the optimizer, Hugging Face name -> rows.
        """
        self.stage: int = grid.get_stage_id()
        self.replica: int = grid.get_data_parallel_id()
        trained, parallel = self.trained_parameters(), self.config.parallel
        shares = divide(trained, parallel.replicas, elementwise(self._shapes(), self.config.optimizer), layer_of)
        self.share = shares[self.replica]
        self.sharded: ShardedStep | None = None
        if parallel.shard_optimizer:
            self.sharded = ShardedStep(trained, shares, self.replica, grid.get_data_parallel_group())
        self.updated = self.sharded.updated if self.sharded else trained

    def _average_gradients(self) -> None:
        """Average the gradients of this stage's trained parameters over its replicas from now on."""
        if self.averager is not None:
            self.averager.close()
        self.averager = None
        if self.config.parallel.replicas > 1:
            tied = [weight for weight, _ in self.pipe.module.get_tied_weights_and_groups()]
            group = self.pipe.grid.get_data_parallel_group()
            self.averager = GradientAverager(self.trained_parameters().values(), group, tied)

    def _layers(self, config: PretrainConfig, fill: Fill) -> list[LayerSpec]:
        """The layers of a pretraining; the two ends of a tied model share one."""
        recompute = config.train.recompute
        model = make_skeleton(self.hf_config, recompute)
        if config.method.kind == BLEND:
            blend_in(model, trainable=config.method.blend_weight == "trainable")
        arguments = (model, self.device, fill, config.train.precision, config.quantization.training_bits)
        specs: list[LayerSpec] = []
        for part in parts_of(self.hf_config, recompute, self.compiler):
            if is_tied(self.hf_config) and part.kind in ("embedding", "head"):

                def run(layer: PipelineLayer, data: Any, part: Any = part) -> Any:
                    return layer.run(part, data)

                tied = {"forward_fn": run, "tied_weight_attr": ["part_modules.0.weight"]}
                specs.append(TiedLayerSpec("embedding", PipelineLayer, part, *arguments, **tied))
            else:
                specs.append(LayerSpec(PipelineLayer, part, *arguments))
        return specs

    def _patch_deepspeed(self) -> None:
        """Change instructions of this engine's schedule."""
        engine = type(self.pipe)

        # The time in passes gives the pipeline's utilization.
        forward, backward = self.times.timed(engine._exec_forward_pass), self.times.timed(engine._exec_backward_pass)
        patches = {schedule.ForwardPass: forward, schedule.BackwardPass: backward}
        if self.device.type == "cpu" and not self.packs:  # packs differ in shape, and NCCL has an order of its own
            patches |= self.exchange.patches(forward, backward)

        def reduce_tied_grads(pipe: Any) -> None:
            self._drop_derived()  # DeepSpeed finds the tied weight by its name, whose gradient the trained one has
            engine._exec_reduce_tied_grads(pipe)

        patches[schedule.ReduceTiedGrads] = reduce_tied_grads
        # DeepSpeed would copy all gradients to a flat buffer and back, and average them after the last pass.
        patches[schedule.ReduceGrads] = lambda pipe: self.averager.finish() if self.averager else None
        self.pipe._INSTRUCTION_MAP = self.pipe._INSTRUCTION_MAP | patches

    # -- names ------------------------------------------------------------------------------

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Hugging Face name -> parameter of this stage; a tied matrix is on the first and on the last stage."""
        return {name: p for layer in self.layers for name, p in layer.parameters_by_name()}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trained ones among them; frozen ones have no gradient, no moments, and are in no checkpoint."""
        return {name: p for name, p in self.named_parameters().items() if p.requires_grad}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.trained_parameters().items()}

    def owned_names(self) -> list[str]:
        """The names of trained parameters without duplicates: the last stage's copy of a tied matrix is omitted."""
        (embedding,) = next(part.names for part in parts_of(self.hf_config) if part.kind == "embedding")
        copy = is_tied(self.hf_config) and self.stage > 0
        return [name for name in self.trained_parameters() if not (copy and name.startswith(embedding + "."))]

    # -- steps ------------------------------------------------------------------------------

    def set_step(self, step: int) -> None:
        """Set the step counter and method 3's alpha; the caller loads weights and moments."""
        self.step = step
        self._set_alpha(max(step, 1))

    def _set_alpha(self, step: int) -> None:
        """Set method 3's alpha for a step; at 0 every W is dropped, with its optimizer state."""
        if not isinstance(self.config, PretrainConfig) or self.config.method.kind != BLEND:
            return
        method = self.config.method
        self.alpha = alpha_at(method, step, self.config.train.steps)
        dropped = set_alpha((module for layer in self.layers for module in layer.modules()), self.alpha)
        if dropped:
            trained = dropped[0].requires_grad
            gone = self.updated.keys() - self.trained_parameters().keys()
            drop_parameters(self.optimizer, [self.updated.pop(name) for name in gone])
            if self.averager is not None:
                self._average_gradients()
            for parameter in dropped:
                self.pipe.param_names.pop(parameter, None)
            log.info(
                f"step {step}: alpha is 0, so every W is dropped"
                + (" and the optimizer rebuilt without them; the others' moments stay." if trained else ".")
            )

    def train_step(self, inputs: Iterator[Tensor], lr: float) -> float:
        """Take one optimizer step and wait for it; return the mean loss in nats. See `start_step`."""
        loss, self.grad_norm = self.start_step(inputs, lr).read()
        return loss

    def start_step(self, inputs: Iterator[Tensor], lr: float) -> Metrics:
        """Take one optimizer step over `micro_batches` micro-batches; a GPU may still work on it afterwards.

        DeepSpeed's schedule calls each `PipelineLayer`, then sends the last stage's loss, averaged over micro-batches
        and replicas, to every worker.

        `inputs` yields int64 tokens (micro_batch_size, seq_len), or packs, on the first stage; other stages do not
        read it. A CPU raises `NonFiniteError` on every process, before the weights change, if the loss or the gradient
        is not finite. On a GPU only reading the metrics raises it: read them before the weights are saved.
        """
        self._set_alpha(self.step + 1)
        set_lr(self.optimizer, lr)
        self._lr = lr
        torch.compiler.cudagraph_mark_step_begin()
        self._derive()
        loss = self.pipe.train_batch(self._labeled(inputs)).detach()
        self.exchange.finish()
        metrics = Metrics(self.step + 1, loss, self._norm)
        if self.device.type == "cpu":
            metrics.read()
        self._free_losses()
        self.step += 1
        return metrics

    def _free_losses(self) -> None:
        """Drop the newest losses, which DeepSpeed stores into the next step, with their inputs and gradients."""
        outputs = self.pipe.pipe_buffers["outputs"]
        outputs[:] = [None] * len(outputs)
        self.pipe.loss = self.pipe.loss.detach()

    def evaluate(self, batches: Sequence[Tensor]) -> float:
        """The mean loss in nats over the micro-batches of every replica, without a step; all have equally many.

        dualpipev fills its schedule with repetitions of all of them, which leaves the mean as it is.
        """
        parallel = self.config.parallel
        least = 2 * parallel.stages if parallel.schedule == "dualpipev" else 1
        inputs = list(batches) * -(-least // len(batches))
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            self._derive()
        # DualPipeVEngine finds its buffers by the number of micro-batches of a training step.
        trained, self.pipe.micro_batches = self.pipe.micro_batches, len(inputs)
        try:
            return float(self.pipe.eval_batch(self._labeled(iter(inputs)), num_micro_batches=len(inputs)).item())
        finally:
            self.exchange.finish()
            self.pipe.micro_batches = trained
            self._drop_derived()

    def _derive(self) -> None:
        """Make the weights that all micro-batches of a step compute with."""
        set_derived([layer.derived for layer in self.layers])

    def _drop_derived(self) -> None:
        for layer in self.layers:
            layer.derived.drop()

    def _labeled(self, inputs: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The (inputs, labels) that DeepSpeed reads. Labels are empty: the tokens travel with the hidden states.

        Inputs are copied to a GPU without waiting for it.
        """
        empty = torch.zeros(1, device=self.device)
        while True:
            if self.stage == 0:
                start = time.perf_counter()
                tokens = next(inputs)
                self.wait_s += time.perf_counter() - start
                if self.device.type == "cuda" and self.packs:
                    tokens = pack_on(tokens, self.device)
                elif self.device.type == "cuda":
                    tokens = tokens.pin_memory().to(self.device, non_blocking=True)
                yield tokens, empty
            else:
                yield empty, empty

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Clip by the norm over the whole model, after DeepSpeed has averaged the gradients; decay products."""
        self._drop_derived()
        if self.before_update is not None:
            self.before_update()
        named = self.trained_parameters()
        own = [named[name].grad for name in self.owned_names() if named[name].grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        if own:
            norms = torch.stack(torch._foreach_norm(own))  # type: ignore[arg-type]
            squares = norms.double().square().sum()
        if self.config.parallel.stages > 1:
            dist.all_reduce(squares, group=self.pipe.grid.get_pipe_parallel_group())
        self._norm = squares.sqrt()
        limit = self.config.optimizer.grad_clip
        grads = [p.grad for p in named.values() if p.grad is not None]
        if self.device.type == "cpu":
            norm = check_finite("gradient norm", self._norm.item(), self.step + 1)
            if limit and norm > limit:
                torch._foreach_mul_(grads, limit / (norm + 1e-6))
        elif limit and grads:  # by a factor on the GPU, which need not be waited for
            torch._foreach_mul_(grads, (limit / (self._norm + 1e-6)).clamp(max=1.0).float())
        if self.config.optimizer.decay == "product":
            modules: Iterator[Any] = (module for layer in self.layers for module in layer.modules())
            pairs = [module.pair() for module in modules if hasattr(module, "pair")]  # low-rank layers and adapters
            decay_products(pairs, self._lr * self.config.optimizer.weight_decay)
        if self._residuals:
            keep_residual(self._residuals, self.updated, self.optimizer.param_groups)
        if self.sharded is not None:
            self.sharded.share_gradients(named)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Exchange the rows that each replica updated."""
        if self.sharded is not None:
            self.sharded.exchange(self.trained_parameters())

    # -- times ------------------------------------------------------------------------------

    def take_times(self) -> tuple[float, float]:
        """(in passes of training steps, waiting for data) seconds since the last call."""
        wait_s, self.wait_s = self.wait_s, 0.0
        return self.times.take(), wait_s


def _waits_for_launches(config: TrainingConfig, hf_config: Any) -> bool:
    """Return whether a GPU computes half a block of a micro-batch faster than its kernels are launched (about 1 ms)."""
    assert isinstance(config, PretrainConfig)
    tokens = config.parallel.micro_batch_size * config.data.seq_len
    return bool(tokens * hf_config.hidden_size**2 < 1e10)  # 5e9 for GPT2-127M and 8 x 1,024 tokens


@contextmanager
def process_group(
    backend: str, world_rank: int = 0, world_size: int = 1, store: Any = None, timeout_s: float = 1800
) -> Iterator[None]:
    """A group of `world_size` processes for an engine; it is destroyed afterwards, so that another can follow.

    The processes meet at `store`, a `torch.distributed.Store`; None is for a single process. `timeout_s`: how long
    one waits for another.
    """
    # DeepSpeed reads these. Each process only sees its own devices, so its local rank is 0.
    os.environ |= {"RANK": str(world_rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    store = store or dist.HashStore()  # type: ignore[attr-defined]
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=world_rank, world_size=world_size, timeout=timeout)
    try:
        yield
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # with DeepSpeed's own record of it
        elif dist.is_initialized():
            dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None
