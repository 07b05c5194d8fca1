"""What a transformer block stores for its backward pass (FinGPT-HPC, section IV.B and Table IV).

- `none`: all that torch saves.
- `attention`: all except attention's probabilities, which are recomputed from queries and keys (see
  `finhpc.models.attention`). torch's fused kernels store nothing so large and are used as they are.
- `full`: only the block's input; the backward pass first runs the block again.

Recomputation runs the same operations on the same values with the same random numbers, so results are bit-identical.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finhpc.models.families.parts import BLOCK, HALVES, LAYER, Flow, Part


def whole_blocks(row: list[Part]) -> list[Part]:
    """Return the row with each block, two halves or a layer, as one part, which stores only its input."""
    merged: list[Part] = []
    for part in row:
        if part.kind == HALVES[1]:
            merged.append(_block(merged.pop(), part))
        else:
            merged.append(_block(part) if part.kind == LAYER else part)
    return merged


def _block(*pieces: Part) -> Part:
    def run(flow: Flow, *modules: nn.Module) -> Flow:
        def whole(hidden: Tensor, tokens: Tensor) -> Any:
            data, begin = (hidden, tokens), 0
            for piece in pieces:
                end = begin + len(piece.names)
                data, begin = piece.run(data, *modules[begin:end]), end
            return data

        draws = any(draws_random(module) for module in modules)
        return checkpoint(whole, *flow, use_reentrant=False, preserve_rng_state=draws)  # type: ignore[no-any-return]

    if prepare := getattr(pieces[0].run, "prepare", None):
        run.prepare = prepare  # type: ignore[attr-defined]
    return Part(tuple(name for piece in pieces for name in piece.names), BLOCK, run)


def draws_random(module: nn.Module) -> bool:
    """Return whether a forward pass of `module` draws random numbers: dropout in training, anywhere in it."""
    return any(
        sub.training and bool(sub.p if isinstance(sub, nn.Dropout) else getattr(sub, "attention_dropout", 0.0))
        for sub in module.modules()
    )
