"""What one micro-batch takes in each kind of part, counted by running the part's own code on tensors without memory.

torch's fake tensors have shapes and no storage, so a block of Llama2-70B is counted in milliseconds
on a laptop, forward and backward, with all that autograd saves. What a kernel takes inside itself
is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finhpc.lowrank.blend import blend_in
from finhpc.models.families.family import Flow, Part
from finhpc.models.families.registry import skeleton
from finhpc.models.pipeline import is_tied, parts_of
from finhpc.settings.training import Recompute


@dataclass(frozen=True)
class PartBytes:
    """Bytes of one part and micro-batch, beside its weights.

    `kept`: from its forward to its backward pass, its input where it needs it, never its output.
    `forward`: the most its forward pass holds beyond its input, what it keeps and its output included.
    `backward`: the most its backward pass holds beyond what is kept and its output's gradient, once
    gradients of the weights are there; `first_backward`: while they are made.
    """

    kept: int
    forward: int
    backward: int
    first_backward: int


class Meter(TorchDispatchMode):
    """Bytes of the tensors made while it is on, now and at most; a storage counts once.

    Tensors made before are not counted if `know` is told of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def know(self, tensors: list[Tensor]) -> None:
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


class NextPart(torch.autograd.Function):
    """Stands for what follows a part: keeps nothing of its output, and hands back a gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        gradient = ctx.gradient
        del ctx.gradient
        return gradient, None


def counted(
    hf_config: Any,
    micro_batch_size: int,
    seq_len: int,
    bf16: bool,
    recompute: Recompute,
    cuda: bool,
    blend: Literal["frozen", "trainable"] | None = None,
) -> dict[str, PartBytes]:
    """Kind of part -> its bytes. `hf_config`: of a model with one block, see `finhpc.planning.outline.one_block`.

    With `cuda` attention is torch's fused kernel and the loss makes its float32 copies, as on a GPU;
    on a CPU they are finhpc's own. `blend`: method 3's W stand beside the factors, as at its beginning.
    """
    model = skeleton(hf_config, recompute)
    if blend:
        blend_in(model, trainable=blend == "trainable")
    row = parts_of(hf_config, recompute)
    if cuda:
        model.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        row = [_as_on_gpu(part, is_tied(hf_config)) for part in row]
    found = {}
    with FakeTensorMode():
        _empty(model)
        tokens = torch.zeros(micro_batch_size, seq_len, dtype=torch.int64)
        for part in row:
            trial = _Trial(part, part.modules(model), tokens, int(hf_config.hidden_size), bf16)
            found[part.kind] = trial.bytes()
    return found


class _Trial:
    def __init__(self, part: Part, modules: list[nn.Module], tokens: Tensor, width: int, bf16: bool) -> None:
        self.part, self.modules, self.tokens, self.bf16 = part, modules, tokens, bf16
        self.shape = (*tokens.shape, width)
        self.seed = torch.zeros((), requires_grad=True)
        for module in modules:
            module.zero_grad(set_to_none=True)  # a tied head's is the embedding's, which was before it

    def bytes(self) -> PartBytes:
        own = [tensor for module in self.modules for tensor in (*module.parameters(), *module.buffers())]
        self.meter = Meter()
        self.meter.know([*own, self.tokens, self.seed])
        with self.meter:
            _, _, first = self._passes()
            kept, forward, again = self._passes()
        return PartBytes(kept=kept, forward=forward, backward=again, first_backward=first)

    def _passes(self) -> tuple[int, int, int]:
        """(kept, most of the forward pass, most of the backward pass)."""
        meter = self.meter
        before = meter.live
        data: Any = self.tokens if self.part.kind == "embedding" else (self._input(), self.tokens)
        start = meter.peak = meter.live
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            out = self.part.run(data, *self.modules)
        forward = meter.peak - start
        hidden = out if isinstance(out, Tensor) else out[0]
        begin = meter.live
        gradient = torch.tensor(0.5) if hidden.dim() == 0 else torch.empty_like(hidden)
        root = NextPart.apply(hidden, gradient)  # type: ignore[no-untyped-call]
        handed = meter.live - begin
        del data, out, hidden, gradient
        kept = meter.live - before - handed
        begin = meter.peak = meter.live
        root.backward()
        return kept, forward, meter.peak - begin

    def _input(self) -> Tensor:
        """What another part would have made: not a leaf, so that nothing but this part holds it."""
        return self.seed.expand(self.shape).clone()


def _empty(model: nn.Module) -> None:
    """Give the model fake parameters and buffers in place of those on the meta device; tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad
                    )
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _as_on_gpu(part: Part, tied: bool) -> Part:
    if part.kind != "head":
        return part
    run: Callable[..., Tensor] = _tied_head if tied else _head
    return Part(part.names, part.kind, run)


def _head(flow: Flow, module: nn.Module) -> Tensor:
    hidden, tokens = flow
    logits: Tensor = module(hidden[:, :-1].reshape(-1, hidden.shape[-1]))
    return F.cross_entropy(logits.float(), tokens[:, 1:].reshape(-1))


def _tied_head(flow: Flow, module: nn.Module) -> Tensor:
    hidden, tokens = flow
    weight = module.weight
    assert isinstance(weight, Tensor)
    logits = F.linear(hidden[:, :-1].reshape(-1, hidden.shape[-1]), weight)
    return F.cross_entropy(logits.float(), tokens[:, 1:].reshape(-1))
