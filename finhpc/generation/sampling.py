"""Choose ids from logits, and log probabilities of ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finhpc.settings.generate import Sampling

SORTED = 1024  # most likely ids, which nearly always sum up to top_p; all are sorted otherwise
COLDEST = 1e-6  # a lower temperature is this one: float32 could not divide by it
DAMAGED = "The model's logits are NaN or infinite; its weights are damaged."


class Score(NamedTuple):
    """Log probability of an id, and (id, log probability) of the most likely ids at its place."""

    logprob: float
    top: list[tuple[int, float]]


def row_seed(seed: int, row: int) -> int:
    """Return the sampling seed of one row; unlike a sum, no two pairs of a seed and a row share it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:8], "big") >> 1


def are_finite(logits: Tensor) -> list[bool]:
    """Return for each row of `logits` (rows, vocab) whether an id can be chosen from it."""
    return torch.isfinite(logits.amax(-1)).tolist()  # type: ignore[no-any-return]


def choose(logits: Tensor, sampling: Sampling, draws: Sequence[torch.Generator]) -> list[int]:
    """Choose an id per row of finite `logits` (rows, vocab): the most likely, or a sample. `draws`: one a row."""
    if not sampling.temperature:
        if logits.device.type == "cpu":  # torch's own takes milliseconds for one row of a large vocabulary
            return logits.float().numpy().argmax(-1).tolist()  # type: ignore[no-any-return]
        return logits.argmax(-1).tolist()  # type: ignore[no-any-return]
    logits = logits.float().cpu()  # sampled on the CPU: the same ids from a seed on every device
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, COLDEST)
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    rows = torch.softmax(logits, -1).unbind()
    if sampling.top_p < 1:
        rows = tuple(_most_likely(row, sampling.top_p) for row in rows)
    return [int(torch.multinomial(row, 1, generator=draw)) for row, draw in zip(rows, draws, strict=True)]


def _most_likely(probabilities: Tensor, top_p: float) -> Tensor:
    """Return the largest of `probabilities` (vocab,) that sum up to `top_p`, and 0 for all others."""
    ordered, order = probabilities.topk(min(SORTED, len(probabilities)))
    if float(ordered.sum()) < top_p:
        ordered, order = probabilities.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # by the sum before it; the first always stays
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered)


def scores_of(logits: Tensor, ids: Sequence[int], top: int) -> list[Score]:
    """Return the score of an id per row of `logits` (rows, vocab), in float32, and of the `top` most likely ones."""
    log_probs = torch.log_softmax(logits.float(), -1)
    own = log_probs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    if not top:
        return [Score(value, []) for value in own]
    values, places = (x.tolist() for x in log_probs.topk(min(top, logits.shape[-1])))
    best = (list(zip(*pair, strict=True)) for pair in zip(places, values, strict=True))
    return [Score(value, pairs) for value, pairs in zip(own, best, strict=True)]
