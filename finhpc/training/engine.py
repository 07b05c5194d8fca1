"""The one engine of every topology: a DeepSpeed pipeline of stages x replicas.

Weights, gradients and AdamW's moments are float32; `bf16` runs the parts under autocast. DeepSpeed
moves activations and averages gradients; clipping is ours, by the norm over all stages, because
the engine's own uses a wrong norm with more than one stage in float32.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import schedule
from torch import Tensor, nn

from finhpc.errors import NonFiniteError
from finhpc.lowrank.blend import alpha_at, blend_in, set_alpha
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.lowrank.registry import BLEND
from finhpc.models.families.registry import skeleton as make_skeleton
from finhpc.models.initialize import Fill, random_fill
from finhpc.models.lora.layers import LoraLinear
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
from finhpc.models.pipeline import PipelineLayer, is_tied, parts_of
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.allocator import keep_freed_memory
from finhpc.training.optimizer import decay_products, forget, make_optimizer, set_lr
from finhpc.training.stages import measured_cut

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]


class CutPipeline(PipelineModule):  # type: ignore[misc]
    """A PipelineModule cut at the borders we choose, not by DeepSpeed's parameter counts."""

    def __init__(self, layers: list[LayerSpec], borders: list[int], dynamic_shape: bool = False) -> None:
        self.parts = borders
        super().__init__(layers=layers, num_stages=len(borders) - 1, dynamic_shape=dynamic_shape)

    def _partition_layers(self, method: str = "") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class Engine:
    """A model being trained on this process's stage.

    `hf_config` is the transformers config of the model; the process group must exist, with
    stages x replicas processes. `borders`: stage i has the parts borders[i] to borders[i + 1] - 1; None:
    the parts are measured, and cut by that. `fill` gives the weights their first numbers; None: they are drawn.
    With `adapt` the model is its frozen base, adapters are all that is trained, and packs take the place of
    tokens; they may differ in length. `alpha` is method 3's of the last step, None with other methods.
    """

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        hf_config: Any,
        device: torch.device,
        borders: list[int] | None = None,
        fill: Fill | None = None,
        adapt: LoraModel | None = None,
    ) -> None:
        self.config, self.hf_config, self.device = config, hf_config, device
        if device.type == "cpu":
            keep_freed_memory()
        parallel = config.parallel
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # inference only; compiling it takes a minute
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        if adapt is not None:
            self.borders = borders or adapt.borders(parallel.stages)
            specs = [LayerSpec(LoraPipelineLayer, part, adapt, device) for part in adapt.parts()]
        else:
            assert isinstance(config, PretrainConfig)
            self.borders = borders or measured_cut(config, hf_config, device).borders
            specs = self._layers(config, fill or random_fill(hf_config, config.train.seed, config.method.init))
        pipeline = CutPipeline(specs, self.borders, dynamic_shape=adapt is not None)
        self.layers = _layers_of(pipeline)
        self.optimizer = make_optimizer(self.trained_parameters(), config.optimizer)
        self.optimizer.register_step_pre_hook(self._before_step)
        self.pipe, *_ = deepspeed.initialize(
            model=pipeline,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": parallel.micro_batch_size,
                "gradient_accumulation_steps": parallel.micro_batches,
                "gradient_clipping": 0.0,
                "steps_per_print": 2**31,
                "zero_optimization": {"stage": 0},
            },
        )
        self.stage: int = self.pipe.grid.get_stage_id()
        self.replica: int = self.pipe.grid.get_data_parallel_id()
        self.alpha: float | None = None
        self.go_to(0)
        self.grad_norm = float("nan")
        self.busy_s = 0.0  # time in forward and backward passes, since `take_times`
        self.wait_s = 0.0  # time waiting for data
        if parallel.replicas == 1:  # DeepSpeed would copy all gradients to average them with nobody's, and back
            self.pipe._INSTRUCTION_MAP = self.pipe._INSTRUCTION_MAP | {schedule.ReduceGrads: lambda pipe: None}
        self._time_passes()

    def _layers(self, config: PretrainConfig, fill: Fill) -> list[LayerSpec]:
        recompute = config.train.recompute
        model = make_skeleton(self.hf_config, recompute)
        if config.method.kind == BLEND:
            blend_in(model, trainable=config.method.blend_weight == "trainable")
        bf16 = config.train.precision == "bf16"
        bits = config.quantization.training_bits
        arguments = (model, self.device, fill, bf16, bits)
        tied_weight = "parts.0.weight" if bits == 16 else "parts.0.parametrizations.weight.original"
        specs: list[LayerSpec] = []
        for part in parts_of(self.hf_config, recompute):
            if is_tied(self.hf_config) and part.kind in ("embedding", "head"):

                def run(layer: PipelineLayer, data: Any, part: Any = part) -> Any:
                    return layer.run(part, data)

                specs.append(
                    TiedLayerSpec(
                        "embedding", PipelineLayer, part, *arguments, forward_fn=run, tied_weight_attr=[tied_weight]
                    )
                )
            else:
                specs.append(LayerSpec(PipelineLayer, part, *arguments))
        return specs

    # -- names ------------------------------------------------------------------------------

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Hugging Face name -> parameter, of this stage. A tied matrix is on the first and last stage."""
        return {name: p for layer in self.layers for name, p in layer.parameters_by_name()}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Those of them that are trained. The others are frozen: no gradient, no moments, in no checkpoint."""
        return {name: p for name, p in self.named_parameters().items() if p.requires_grad}

    def owned_names(self) -> list[str]:
        """Names of what this stage trains and answers for: all but the last stage's copy of a tied matrix."""
        (embedding,) = next(part.names for part in parts_of(self.hf_config) if part.kind == "embedding")
        copy = is_tied(self.hf_config) and self.stage > 0
        return [name for name in self.trained_parameters() if not (copy and name.startswith(embedding + "."))]

    # -- steps ------------------------------------------------------------------------------

    def go_to(self, step: int) -> None:
        """Stand where a run stands that has taken `step` steps; its weights and moments are for the caller to load."""
        self.step = step
        self._blend(max(step, 1))

    def _blend(self, step: int) -> None:
        """Set method 3's alpha for a step. At 0 every W is dropped, with what the optimiser keeps for it."""
        if not isinstance(self.config, PretrainConfig) or self.config.method.kind != BLEND:
            return
        method = self.config.method
        self.alpha = alpha_at(method, step, self.config.train.steps)
        gone = set_alpha((module for layer in self.layers for module in layer.modules()), self.alpha)
        if gone:
            trained = gone[0].requires_grad
            forget(self.optimizer, gone)
            for parameter in gone:
                self.pipe.param_names.pop(parameter, None)
            log.info(
                f"step {step}: alpha is 0, so every W is dropped"
                + (" and the optimiser rebuilt without them; the others' moments stay." if trained else ".")
            )

    def train_step(self, batches: Iterator[Tensor], lr: float) -> float:
        """One optimiser step over `micro_batches` micro-batches; returns the mean loss in nats.

        `batches` yields int64 tokens (micro_batch_size, seq_len), or packs, on the first stage; the others
        read nothing. Raises `NonFiniteError` on every process, before the weights change, when the loss
        or the gradient is not finite.
        """
        self._blend(self.step + 1)
        set_lr(self.optimizer, lr)
        self._lr = lr
        loss = float(self.pipe.train_batch(self._inputs(batches)).item())
        if loss != loss or abs(loss) == float("inf"):
            raise NonFiniteError(f"train_loss={loss} at step {self.step + 1}")
        self._let_go()
        self.step += 1
        return loss

    def _let_go(self) -> None:
        """Drop the newest losses: DeepSpeed keeps them, with their inputs and those' gradients, into the next step."""
        outputs = self.pipe.pipe_buffers["outputs"]
        outputs[:] = [None] * len(outputs)
        self.pipe.loss = self.pipe.loss.detach()

    def evaluate(self, batches: Iterator[Tensor], micro_batches: int) -> float:
        """Mean loss in nats over `micro_batches` micro-batches of every replica, without a step."""
        return float(self.pipe.eval_batch(self._inputs(batches), num_micro_batches=micro_batches).item())

    def _inputs(self, batches: Iterator[Tensor]) -> Iterator[Batch]:
        """What DeepSpeed wants: (inputs, labels). Labels travel with the hidden states instead."""
        nothing = torch.zeros(1)
        first = self.stage == 0

        def pairs() -> Iterator[Batch]:
            while True:
                if first:
                    start = time.perf_counter()
                    tokens = next(batches)
                    self.wait_s += time.perf_counter() - start
                    yield tokens, nothing
                else:
                    yield nothing, nothing

        return pairs()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Clip by the norm over the whole model, after DeepSpeed has averaged the gradients; decay products."""
        named = self.trained_parameters()
        own = [named[name].grad for name in self.owned_names() if named[name].grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        if own:
            norms = torch.stack(torch._foreach_norm(own))  # type: ignore[arg-type]
            squares = norms.double().square().sum()
        if self.config.parallel.stages > 1:
            dist.all_reduce(squares, group=self.pipe.grid.get_pipe_parallel_group())
        self.grad_norm = float(squares.sqrt().item())
        if self.grad_norm != self.grad_norm or self.grad_norm == float("inf"):
            raise NonFiniteError(f"gradient norm={self.grad_norm} at step {self.step + 1}")
        limit = self.config.optimizer.grad_clip
        if limit and self.grad_norm > limit:
            grads = [p.grad for p in named.values() if p.grad is not None]
            torch._foreach_mul_(grads, limit / (self.grad_norm + 1e-6))
        if self.config.optimizer.decay == "product":
            modules = (module for layer in self.layers for module in layer.modules())
            kinds = LowRankLinear | LowRankEmbedding | LoraLinear
            pairs = [module.pair() for module in modules if isinstance(module, kinds)]
            decay_products(pairs, self._lr * self.config.optimizer.weight_decay)

    # -- how busy ---------------------------------------------------------------------------

    def _time_passes(self) -> None:
        """Count the time this worker spends in forward and backward passes."""
        engine = type(self.pipe)

        def timed(instruction: Any) -> Any:
            def run(pipe: Any, *args: Any, **kwargs: Any) -> None:
                self._synchronize()
                start = time.perf_counter()
                instruction(pipe, *args, **kwargs)
                self._synchronize()
                self.busy_s += time.perf_counter() - start

            return run

        self.pipe._INSTRUCTION_MAP = self.pipe._INSTRUCTION_MAP | {
            schedule.ForwardPass: timed(engine._exec_forward_pass),
            schedule.BackwardPass: timed(engine._exec_backward_pass),
        }

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take_times(self) -> tuple[float, float]:
        """(busy, waiting for data) seconds since the last call."""
        times = self.busy_s, self.wait_s
        self.busy_s = self.wait_s = 0.0
        return times


@contextmanager
def process_group(
    backend: str, rank: int = 0, size: int = 1, store: Any = None, timeout_s: float = 1800
) -> Iterator[None]:
    """A group of `size` processes for engines to be made in; gone afterwards, so that another can follow.

    `store`: a `torch.distributed.Store` where they meet; None: this process is alone. `timeout_s`: how long one waits
    for another.
    """
    # DeepSpeed reads them. Each process sees its own devices alone, so that it is the first on its node.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    store = store or dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # and what DeepSpeed remembers of it
        elif dist.is_initialized():
            dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def _layers_of(pipeline: PipelineModule) -> list[PipelineLayer]:
    """The PipelineLayer objects of this stage, a tied one once."""
    return [module for module in pipeline.modules() if isinstance(module, PipelineLayer)]
