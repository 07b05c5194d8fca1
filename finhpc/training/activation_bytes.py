"""The bytes that a forward pass keeps for its backward pass, counted exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from finhpc.models.families.family import BLOCKS, Part


def saved_bytes(forward: Callable[[], object], *modules: nn.Module) -> int:
    """Bytes of the storages that `forward` saves for backward, each once, without the parameters of `modules`.

    On the meta device too. Casts that autocast makes of parameters are counted: they are kept. What a
    Function keeps beside `save_for_backward` is not seen; of ours, the loss keeps its gradient so.
    """
    parameters = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage takes its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


def block_saved_bytes(row: list[Part], model: Any, batch: int, seq_len: int) -> int:
    """What the first transformer block of `row` keeps for (batch, seq_len) tokens, in bytes.

    The block's input and the tokens count where it keeps them. Count on the device that will train: on the meta
    device torch takes its attention that is not fused, whatever the shape, and ours is for CPU tensors.
    """
    device = next(model.parameters()).device
    hidden = torch.randn(batch, seq_len, model.config.hidden_size, device=device, requires_grad=True)
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64, device=device)

    def forward() -> Any:
        data = hidden, tokens
        for part in first_block(row):
            data = part.run(data, *part.modules(model))
        return data

    return saved_bytes(forward, model)


def first_block(row: list[Part]) -> list[Part]:
    """The parts of the first transformer block: two halves, or one."""
    parts: list[Part] = []
    for part in row:
        if part.in_block and sum(BLOCKS[mine.kind] for mine in parts) < 1:
            parts.append(part)
    return parts
