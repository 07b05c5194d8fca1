"""Log probabilities after the last ids of texts, of which those that begin alike are computed once up to there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finhpc.generation.blocks import Blocks
from finhpc.generation.decoder import Decoder
from finhpc.generation.requests import Request, Row
from finhpc.generation.schedule import Schedule, hidden_states
from finhpc.models.lora.multi_lora import NONE
from finhpc.settings.generate import Sampling

BLOCK = 8  # tokens: what texts share is a multiple of it
TOKENS = 2048  # of a pass, whose keys and values are in memory
LOGITS = 128  # rows of logits that are in memory at a time, or those of one text


def last_log_probs(
    decoder: Decoder, texts: Sequence[Sequence[int]], last: Sequence[int], batch: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of each text and the float32 log probabilities (last, vocab) of what follows its last ids.

    `texts` are not empty and fit the context; `last`: how many of their last ids. At most `batch` are computed at once.
    An adapter of the model is used as it was selected.
    """
    longest = max(map(len, texts), default=1)
    count = -(-max(TOKENS, longest) // BLOCK) + 2 * batch
    schedule = Schedule(Blocks(count, BLOCK), batch, TOKENS, keeps=True)
    nothing = Sampling.model_construct(max_new_tokens=0)
    for i in sorted(range(len(texts)), key=lambda i: tuple(texts[i])):
        ids = list(texts[i])
        scored = Request(str(i), ids, None, nothing, prompt_logprobs=True, score_from=len(ids) - last[i] + 1)
        schedule.waiting.append(Row(scored, NONE, ids))
    cache = decoder.make_cache(count, BLOCK, decoder.model.dtype)  # rounds as the model's own pass does
    found: dict[str, Tensor] = {}  # hidden states of the last ids, once a pass computed some
    while rows := schedule.next_rows():
        hidden, begin = hidden_states(decoder, cache, schedule, rows), 0
        ended = []
        for row in rows:
            name, first = row.request.name, max(0, row.scored - 1 - row.computed)
            some = hidden[begin + first : begin + row.new]
            found[name] = torch.cat((found[name], some)) if name in found else some
            row.computed += row.new
            begin += row.new
            if row.computed == len(row.ids):
                schedule.remove(row)
                ended.append((int(name), found.pop(name)))
        yield from _log_probs(decoder, ended)


def _log_probs(decoder: Decoder, ended: list[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Yield log probabilities after hidden states, for as many texts at a time as `LOGITS` allows."""
    while ended:
        count, rows = 1, len(ended[0][1])
        while count < len(ended) and rows + len(ended[count][1]) <= LOGITS:
            rows += len(ended[count][1])
            count += 1
        some, ended = ended[:count], ended[count:]
        with torch.inference_mode():
            log_probs = torch.log_softmax(decoder.predict(torch.cat([hidden for _, hidden in some])).float(), -1)
        yield from zip([i for i, _ in some], log_probs.split([len(hidden) for _, hidden in some]), strict=True)
