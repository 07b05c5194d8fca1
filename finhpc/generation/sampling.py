"""Generate ids after prompts, one token of every row at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from finhpc.errors import NonFiniteError
from finhpc.generation.decoder import Decoder
from finhpc.settings.generate import Sampling


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Collection[int] = (),
    cache: bool = True,
    first: int = 0,
) -> Iterator[list[int | None]]:
    """Yield the next id of every row, None for rows that have ended, until all have.

    `prompts` are not empty and fit the context together with the new ids. A row ends after an id of `stop`, which is
    yielded too. `first`: number of the first row in the whole input, which seeds its sampling. Without `cache` whole
    rows are computed again for every token. Raises `NonFiniteError` if logits are NaN.
    """
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=decoder.device)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(rows, device=decoder.device)
    length = longest + sampling.max_new_tokens
    draws = [torch.Generator().manual_seed(row_seed(sampling.seed, first + i)) for i in range(len(prompts))]
    running = [True] * len(prompts)
    decoder.reset(len(prompts), length, padding)
    passed = tokens
    for step in range(sampling.max_new_tokens):
        if step and not cache:
            decoder.reset(len(prompts), length, padding)
            passed = tokens
        chosen = choose(decoder(passed), sampling, draws)
        ids = chosen.tolist()
        yield [token if alive else None for token, alive in zip(ids, running, strict=True)]
        running = [alive and token not in stop for token, alive in zip(ids, running, strict=True)]
        if not any(running):
            return
        passed = chosen[:, None]
        if not cache:
            tokens = torch.cat((tokens, passed), 1)


def row_seed(seed: int, row: int) -> int:
    """Return the sampling seed of one row; unlike a sum, no two pairs of a seed and a row share it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:8], "big") >> 1


def choose(logits: Tensor, sampling: Sampling, draws: Sequence[torch.Generator]) -> Tensor:
    """Choose an id per row of `logits` (batch, vocab): the most likely, or a sample. `draws`: each row's generator."""
    if not sampling.temperature:
        best, ids = logits.max(-1)
        if not bool(torch.isfinite(best).all()):
            raise NonFiniteError("The model's logits are NaN or infinite; its weights are damaged.")
        return ids
    device = logits.device
    logits = logits.float().cpu() / sampling.temperature  # sampled on the CPU: the same ids from a seed on every device
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = torch.softmax(logits, -1)
    if not bool(torch.isfinite(probabilities).all()):
        raise NonFiniteError("The model's logits are NaN or infinite; its weights are damaged.")
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0  # by the sum before it; the first always stays
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    pairs = zip(probabilities, draws, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=draw) for row, draw in pairs]).to(device)
