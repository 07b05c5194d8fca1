"""Continue prompts that are all there from the beginning."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from finhpc.errors import NonFiniteError
from finhpc.generation.batching import BLOCK, Batcher
from finhpc.generation.decoder import Decoder
from finhpc.generation.requests import Request, Token
from finhpc.models.lora.multi_lora import Adapters
from finhpc.settings.generate import Sampling

PREFILL = 2048  # tokens of prompts in a pass


def passes(
    decoder: Decoder, requests: Sequence[Request], batch: int, cache: bool = True, adapters: Adapters | None = None
) -> Iterator[list[Token]]:
    """Yield the tokens of each pass until all requests have ended, of which `batch` run at once, without preemption.

    Without `cache` whole rows are computed again for every token. Raises `NonFiniteError` if logits are NaN.
    """
    needs = sorted(-(-(len(request.ids) + request.sampling.max_new_tokens) // BLOCK) for request in requests)
    blocks = sum(needs[-batch:])
    prefill = PREFILL if cache else blocks * BLOCK
    batcher = Batcher(decoder, adapters, blocks=blocks, max_batch=batch, prefill_tokens=prefill, cache=cache)
    for request in requests:
        batcher.add(request)
    while batcher.wait(0):
        tokens = batcher.step()
        for token in tokens:
            if token.error is not None:
                raise NonFiniteError(token.error)
        yield tokens


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Collection[int] = (),
    cache: bool = True,
    first: int = 0,
    adapters: Adapters | None = None,
    names: Sequence[str | None] = (),
) -> Iterator[list[int | None]]:
    """Yield the new ids of each pass, None for rows that got none, until all rows have ended.

    `prompts` are not empty and fit the context together with the new ids. A row ends after an id of `stop`, which is
    yielded too. `first`: number of the first row in the whole input, which seeds its sampling. `names`: of the rows'
    `adapters`; without them the model is used as it is.
    """
    requests = [
        Request(str(i), prompt, names[i] if names else None, sampling, stop=stop, row=first + i)
        for i, prompt in enumerate(prompts)
    ]
    for tokens in passes(decoder, requests, len(requests), cache, adapters):
        ids: list[int | None] = [None] * len(prompts)
        for token in tokens:
            ids[int(token.request)] = token.id
        yield ids
