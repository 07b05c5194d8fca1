"""What a transformer block keeps for its backward pass (FinGPT-HPC, section IV.B and Table IV).

- `none`: all that torch saves.
- `attention`: all but attention's probabilities, computed again from queries and keys (see
  `finhpc.models.attention`). Where torch's kernel is fused it keeps nothing so large, and runs as it is.
- `full`: the block's input alone; the backward pass runs the block once more before it.

The same operations on the same values with the same random draws: the numbers are the same to the bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finhpc.models.families.family import BLOCK, HALVES, Flow, Part


def whole_blocks(row: list[Part]) -> list[Part]:
    """The row with each block's two halves as one part, which keeps its input alone."""
    merged: list[Part] = []
    for part in row:
        merged.append(_block(merged.pop(), part) if part.kind == HALVES[1] else part)
    return merged


def _block(attention: Part, mlp: Part) -> Part:
    split = len(attention.names)

    def run(flow: Flow, *modules: nn.Module) -> Flow:
        def halves(hidden: Tensor, tokens: Tensor) -> Any:
            return mlp.run(attention.run((hidden, tokens), *modules[:split]), *modules[split:])

        draws = any(draws_random(module) for module in modules)
        return checkpoint(halves, *flow, use_reentrant=False, preserve_rng_state=draws)  # type: ignore[no-any-return]

    return Part(attention.names + mlp.names, BLOCK, run)


def draws_random(module: nn.Module) -> bool:
    """Whether a forward pass of `module` draws random numbers: dropout in training, anywhere in it."""
    return any(
        sub.training and bool(sub.p if isinstance(sub, nn.Dropout) else getattr(sub, "attention_dropout", 0.0))
        for sub in module.modules()
    )
