"""The memory of one micro-batch in each kind of part, measured by running the part's own code on fake tensors.

torch's fake tensors have shapes and no storage, so a block of Llama2-70B takes milliseconds on a laptop, forward and
backward, with everything that autograd saves. Memory that a kernel allocates internally is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finhpc.lowrank.blend import blend_in
from finhpc.lowrank.sltrain import SparseLinear
from finhpc.models import loss
from finhpc.models.derived import DerivedWeights
from finhpc.models.families.parts import Part
from finhpc.models.families.registry import skeleton
from finhpc.models.pipeline import parts_of
from finhpc.settings.training import Precision, Recompute


@dataclass(frozen=True)
class PartBytes:
    """Bytes of one part and micro-batch, without its weights.

    `kept`: from its forward to its backward pass, with its input if backward needs it, never its output.
    `forward`: the peak of its forward pass beyond its input, including what is kept and the output.
    `backward`: the peak of its backward pass beyond what is kept and its output's gradient, once the weights'
    gradients exist; `first_backward`: while they are being made. `derived`: of the weights that are cast or rounded
    once per step, for all micro-batches, and of the places of SLTrain's sparse entries.
    """

    kept: int
    forward: int
    backward: int
    first_backward: int
    derived: int = 0


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, now and at their peak; each storage once.

    Tensors passed to `ignore` are not counted. What the loss allocates inside, on `device`, counts in the peak.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: list[Tensor]) -> None:
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.finhpc.linear_cross_entropy.default:
            (rows, width), vocab, size = args[0].shape, args[1].shape[0], args[1].element_size()
            peak = loss.peak_bytes(rows, vocab, width, size, self.device, capped=bool(args[5]))
            self.peak = max(self.peak, self.live + peak)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, storage.nbytes()).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _NextPart(torch.autograd.Function):
    """Stands for whatever follows a part: keeps nothing of its output, and returns a gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        gradient = ctx.gradient
        del ctx.gradient
        return gradient, None


def run_passes(meter: Meter, run: Callable[[Any], Any], make_input: Callable[[], Any]) -> tuple[PartBytes, int, bool]:
    """Run a part forward and, if its output requires a gradient, backward; the meter must be on.

    Returns the bytes, the rows of the output, and whether the output requires a gradient. `first_backward` is this
    backward pass.
    """
    before = meter.live
    data = make_input()
    start = meter.peak = meter.live
    out = run(data)
    forward = meter.peak - start
    hidden = out if isinstance(out, Tensor) else out[0]
    rows = hidden.shape[1] if hidden.dim() > 1 else 0
    if not hidden.requires_grad:
        return PartBytes(0, forward, 0, 0), rows, False
    begin = meter.live
    gradient = torch.tensor(0.5) if hidden.dim() == 0 else torch.empty_like(hidden)
    root = _NextPart.apply(hidden, gradient)  # type: ignore[no-untyped-call]
    handed_over = meter.live - begin
    del data, out, hidden, gradient
    kept = meter.live - before - handed_over
    begin = meter.peak = meter.live
    root.backward()
    backward = meter.peak - begin
    return PartBytes(kept, forward, backward, backward), rows, True


def count_parts(
    hf_config: Any,
    micro_batch_size: int,
    seq_len: int,
    precision: Precision,
    bits: int,
    recompute: Recompute,
    cuda: bool,
    blend: Literal["frozen", "trainable"] | None = None,
) -> dict[str, PartBytes]:
    """Kind of part -> its bytes in pretraining. `hf_config`: of the model with one block.

    With `cuda` attention is torch's fused kernel and the loss takes more rows at a time, as on a GPU. `blend`: method
    3's W exists next to its factors, as in its first steps.
    """
    model, width = skeleton(hf_config, recompute), int(hf_config.hidden_size)
    if blend:
        blend_in(model, trainable=blend == "trainable")
    row = parts_of(hf_config, recompute)
    dtype = torch.bfloat16 if precision == "bf16-weights" else torch.float32
    if cuda and getattr(hf_config, "attn_logit_softcapping", None) is None:  # no kernel caps scores
        model.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    counted = {}
    with FakeTensorMode():
        _materialize(model)
        tokens = torch.zeros(micro_batch_size, seq_len, dtype=torch.int64)
        for part in row:
            modules = part.modules(model)
            for module in modules:
                module.zero_grad(set_to_none=True)  # a tied head shares the embedding's, which came before it
            one = torch.zeros((), requires_grad=True)
            meter = Meter("cuda" if cuda else "cpu")
            meter.ignore([tensor for module in modules for tensor in (*module.parameters(), *module.buffers())])
            meter.ignore([tokens, one])
            derived = DerivedWeights(nn.ModuleList(modules), precision, bits)
            with meter:
                derived.set()
            subs = [sub for module in modules for sub in module.modules()]
            supports = [sub.support.nbytes for sub in subs if isinstance(sub, SparseLinear)]
            derived_bytes, meter.peak = meter.live + sum(supports), 0

            def make_input(part: Part = part, one: Tensor = one) -> Any:
                # Not a leaf, as if another part had made it: only this part keeps it alive.
                hidden = one.expand(*tokens.shape, width).to(dtype, copy=True)
                return tokens if part.kind == "embedding" else (hidden, tokens)

            def run(data: Any, part: Part = part, modules: list[nn.Module] = modules) -> Any:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                    return part.run(data, *modules)

            with meter:
                first, second = (run_passes(meter, run, make_input)[0] for _ in range(2))
            derived.drop()
            counted[part.kind] = replace(second, first_backward=first.backward, derived=derived_bytes)
    return counted


def _materialize(model: nn.Module) -> None:
    """Replace meta parameters and buffers with fake ones; tied ones stay one tensor."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in parameters:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    parameters[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = parameters[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
