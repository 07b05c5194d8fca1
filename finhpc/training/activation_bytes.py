"""The bytes that a forward pass stores for its backward pass, counted exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from finhpc.models.families.parts import BLOCKS, Part


def saved_bytes(forward: Callable[[], object], *modules: nn.Module) -> int:
    """The bytes of the storages that `forward` saves for backward, each once, without the parameters of `modules`.

    Works on the meta device too. Casts of parameters by autocast are counted, because they are stored.
    """
    parameters = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # referenced, so that no other storage gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


def block_saved_bytes(row: list[Part], model: Any, batch: int, seq_len: int) -> int:
    """The bytes that the first transformer block of `row` stores for (batch, seq_len) tokens.

    The block's input and the tokens count if it stores them. Count on the device that will train: on the meta device
    torch always uses its unfused attention, and ours is for CPU tensors.
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
