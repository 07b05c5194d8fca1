"""Continuous batching: requests join and leave between passes, and a pass computes what all of them need next.

G. Yu et al., "Orca", 2022, section 3: scheduling by iterations. W. Kwon et al., "PagedAttention", 2023, section 4.5:
when blocks run out, the last request to come gives back its own and is computed again later. A. Agrawal et al.,
"Sarathi-Serve", 2024, section 4: prompts are computed in parts, in the same pass as the next ids of
others, which need not wait.

A request is what it knows: its ids, of which the first `computed` have keys and values in its blocks. A pass computes
some of the rest: one id while it is generating, more after it came or was preempted. So an id does not depend on when
it is computed, except for rounding: products with other numbers of rows may differ in the last bits.

transformers' continuous batching gives all requests one adapter. It computed the same ids in 1.12 times our processor
time (SmolLM2-135M in float32, 8 requests, one thread); `finhpc bench generate` compares the two.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from finhpc.errors import ConfigError
from finhpc.generation.blocks import Blocks
from finhpc.generation.decoder import Decoder
from finhpc.generation.requests import Request, Row, Stats, Token
from finhpc.generation.sampling import DAMAGED, Score, are_finite, choose, scores_of
from finhpc.generation.schedule import Schedule, hidden_states
from finhpc.models.lora.multi_lora import NONE, Adapters
from finhpc.models.lora.peft_format import Adapter
from finhpc.settings.base import nearest

BLOCK = 32  # tokens
SCORED_ROWS = 128  # rows of logits of a prompt that are in memory at a time


class Batcher:
    """Continues the requests that are added, with `blocks` blocks of keys and values for all of them.

    Any thread may add and cancel; one thread calls `step`. After an exception of `step` it cannot be used any more;
    logits that are NaN end only their request. `prefill_tokens`: tokens of prompts in a pass. Without `cache` all
    tokens are computed again in each pass.
    """

    def __init__(
        self,
        decoder: Decoder,
        adapters: Adapters | None = None,
        *,
        blocks: int,
        block_size: int = BLOCK,
        max_batch: int,
        prefill_tokens: int,
        cache: bool = True,
    ) -> None:
        self.decoder, self.adapters = decoder, adapters
        self.schedule = Schedule(Blocks(blocks, block_size), max_batch, prefill_tokens, keeps=cache)
        self.cache = decoder.make_cache(blocks, block_size)
        self.tokens_in = self.tokens_out = 0
        self._changed = threading.Condition()
        self._known = set(adapters.numbers) if adapters is not None else set()  # names for new requests
        self._inbox: list[Request | tuple[str, Adapter | None]] = []
        self._names: set[str] = set()
        self._cancelled: set[str] = set()
        self._leaving: set[int] = set()  # adapters that are removed when no request uses them
        self._serial = 0

    # -- for any thread -----------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises `ConfigError` if it can never be computed."""
        with self._changed:
            if problems := self._problems(request):
                raise ConfigError(problems)
            self._names.add(request.name)
            self._inbox.append(request)
            self._changed.notify_all()

    def cancel(self, name: str) -> None:
        """End a request, whose blocks are free after the next step; nothing happens if it has ended."""
        with self._changed:
            if name in self._names:
                self._cancelled.add(name)
                self._changed.notify_all()

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Attach an adapter at the beginning of the next step; requests can name it at once.

        Raises `ConfigError` if one of that name is loaded, or if its base was quantized in another way in training.
        """
        assert self.adapters is not None
        self.adapters.check(name, adapter)
        with self._changed:
            if name in self._known:
                raise ConfigError(f"adapter {name} is loaded already; remove it first, or choose another name.")
            self._known.add(name)
            self._inbox.append((name, adapter))
            self._changed.notify_all()

    def remove_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter, and detach it when the last one has ended."""
        with self._changed:
            if name not in self._known:
                raise ConfigError(f"adapter {name} is not loaded; {self._loaded(name)}")
            self._known.discard(name)
            self._inbox.append((name, None))
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is something to do for `step`; returns whether there is."""
        with self._changed:
            return self._changed.wait_for(self._has_work, timeout)

    def stats(self) -> Stats:
        """Return counts so far, those of blocks and running requests as of the last step."""
        schedule, blocks = self.schedule, self.schedule.blocks
        with self._changed:
            waiting = sum(isinstance(entry, Request) for entry in self._inbox) + len(schedule.waiting)
        return Stats(
            waiting=waiting,
            running=len(schedule.running),
            blocks_total=blocks.count,
            blocks_used=blocks.used,
            blocks_shared=blocks.shared,
            preemptions=schedule.preemptions,
            prefix_hits=schedule.prefix_hits,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
        )

    def _has_work(self) -> bool:
        return bool(self._inbox or self._cancelled or self.schedule.running or self.schedule.waiting)

    def _problems(self, request: Request) -> list[str]:
        ids, new, context = request.ids, request.sampling.max_new_tokens, self.decoder.context
        rows, blocks, problems = self.decoder.config.vocab_size, self.schedule.blocks, []
        if request.name in self._names:
            problems.append(f"request {request.name} is being computed already; choose another name.")
        if request.adapter is not None and request.adapter not in self._known:
            problems.append(f"adapter {request.adapter} is not loaded; {self._loaded(request.adapter)}")
        if not ids:
            problems.append("the prompt has no tokens; give at least one.")
        elif not 0 <= min(ids) <= max(ids) < rows:
            wrong = next(token for token in ids if not 0 <= token < rows)
            problems.append(f"the prompt holds the id {wrong:,}, but the model has rows for {rows:,}; correct it.")
        if len(ids) + new > context:
            problems.append(
                f"a prompt of {len(ids):,} tokens and {new:,} new ones exceed the context of {context:,}; shorten the "
                "prompt or ask for fewer."
            )
        elif blocks.blocks_of(len(ids) + new) > blocks.count:
            whole = blocks.count * blocks.size
            problems.append(
                f"a prompt of {len(ids):,} tokens and {new:,} new ones exceed the whole cache of {whole:,} tokens; "
                "enlarge the cache or ask for fewer."
            )
        return problems

    def _loaded(self, name: str) -> str:
        return nearest(name, sorted(self._known)) if self._known else "no adapter is."

    # -- for the thread that computes ---------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Compute one pass; returns what it brought, nothing if there is nothing to do."""
        ended = self._receive()
        rows = self.schedule.next_rows()
        tokens = ended + (self._compute(rows) if rows else [])
        if not self.schedule.keeps:
            for row in self.schedule.running:
                self.schedule.reset(row)
        if self._leaving:
            self._detach()
        return tokens

    def _receive(self) -> list[Token]:
        """Take over what other threads left; returns the ends of cancelled requests."""
        with self._changed:
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, set()
        for entry in inbox:
            if isinstance(entry, Request):
                self._arrive(entry)
            else:
                self._change_adapter(*entry)
        rows = [row for row in self.schedule.rows if row.request.name in cancelled] if cancelled else []
        return [self._end(row, Token(row.request.name, None, finish="cancelled")) for row in rows]

    def _arrive(self, request: Request) -> None:
        number = NONE if request.adapter is None else self._numbers()[request.adapter]
        self.schedule.waiting.append(Row(request, number, list(request.ids)))
        self.tokens_in += len(request.ids)

    def _numbers(self) -> dict[str, int]:
        assert self.adapters is not None
        return self.adapters.numbers

    def _change_adapter(self, name: str, adapter: Adapter | None) -> None:
        assert self.adapters is not None
        if adapter is None:
            self._leaving.add(self.adapters.numbers.pop(name))
        else:
            number = self.adapters.add(name, adapter)
            self._serial += 1
            self.schedule.roots[number] = f"{number} {self._serial}"
            self.decoder.find_modules()

    def _detach(self) -> None:
        """Free the adapters that were removed and that no request uses."""
        assert self.adapters is not None
        used = {row.adapter for row in self.schedule.rows}
        for number in self._leaving - used:
            self.adapters.free(number)
            self._leaving.discard(number)

    def _end(self, row: Row, token: Token, damaged: bool = False) -> Token:
        """Remove a row for good."""
        self.schedule.remove(row, damaged)
        with self._changed:
            self._names.discard(row.request.name)
            self._cancelled.discard(row.request.name)  # a later request may have its name
        return token

    def _compute(self, rows: list[Row]) -> list[Token]:
        hidden = hidden_states(self.decoder, self.cache, self.schedule, rows, self.adapters)
        self._score_prompts(rows, hidden)
        complete, last, begin = [], [], 0
        for row in rows:
            row.computed += row.new
            begin += row.new
            if row.computed == len(row.ids):
                complete.append(row)
                last.append(begin - 1)
        ended = [self._scored(row) for row in complete if not row.request.sampling.max_new_tokens]
        places = [place for row, place in zip(complete, last, strict=True) if row.request.sampling.max_new_tokens]
        going = [row for row in complete if row.request.sampling.max_new_tokens]
        return ended + (self._continue(going, self.decoder.predict(hidden[places])) if going else [])

    def _score_prompts(self, rows: list[Row], hidden: Tensor) -> None:
        """Score the ids of prompts that follow the tokens of `hidden`, unless that was done before a preemption."""
        places: list[tuple[Row, int, int]] = []  # a row, where its hidden state is, and the id that follows
        begin = 0
        for row in rows:
            if row.request.prompt_logprobs:
                prompt, shift = row.request.ids, begin - row.computed
                first = max(row.computed, row.scored - 1 + len(row.scores))
                last = min(row.computed + row.new, len(prompt) - 1)
                places += [(row, shift + place, prompt[place + 1]) for place in range(first, last)]
            begin += row.new
        for begin in range(0, len(places), SCORED_ROWS):
            some = places[begin : begin + SCORED_ROWS]
            logits = self.decoder.predict(hidden[[place for _, place, _ in some]])
            most = max(row.request.logprobs or 0 for row, _, _ in some)
            for (row, _, _), score in zip(some, scores_of(logits, [token for *_, token in some], most), strict=True):
                row.scores.append(Score(score.logprob, score.top[: row.request.logprobs or 0]))

    def _scored(self, row: Row) -> Token:
        """End a row of which nothing but scores was asked."""
        name = row.request.name
        if any(not math.isfinite(score.logprob) for score in row.scores):
            return self._end(row, Token(name, None, finish="error", error=DAMAGED), damaged=True)
        return self._end(row, Token(name, None, finish="length", prompt_logprobs=row.prompt_scores))

    def _continue(self, rows: list[Row], logits: Tensor) -> list[Token]:
        """Choose the next id of rows whose ids are all computed."""
        finite = are_finite(logits)
        ids = _choose(rows, logits, finite)
        scores = _score(rows, logits, ids)
        return list(map(self._next, rows, finite, ids, scores))

    def _next(self, row: Row, finite: bool, chosen: int, score: Score | None) -> Token:
        request, name = row.request, row.request.name
        if not finite:
            return self._end(row, Token(name, None, finish="error", error=DAMAGED), damaged=True)
        prompt = row.prompt_scores if request.prompt_logprobs and not row.generated else None
        row.ids.append(chosen)
        self.tokens_out += 1
        finish = None
        if chosen in request.stop:
            finish = "stop"
        elif row.generated == request.sampling.max_new_tokens:
            finish = "length"
        logprob, top = score if score is not None else (None, [])
        token = Token(name, chosen, logprob, top, finish, prompt_logprobs=prompt)
        return token if finish is None else self._end(row, token)


def _choose(rows: list[Row], logits: Tensor, finite: list[bool]) -> list[int]:
    """Return the next id of each row, with its own settings; of a row that is not finite, any."""
    alike: dict[tuple[float, int, float], list[int]] = {}
    for i, row in enumerate(rows):
        how = row.request.sampling
        if finite[i]:
            key = (how.temperature, how.top_k, how.top_p) if how.temperature else (0.0, 0, 1.0)
            alike.setdefault(key, []).append(i)
    ids = [0] * len(rows)
    for places in alike.values():
        some = logits if len(places) == len(rows) else logits[places]
        how = rows[places[0]].request.sampling
        draws = [rows[i].generator() for i in places] if how.temperature else []
        chosen = choose(some, how, draws)
        for i, token in zip(places, chosen, strict=True):
            ids[i] = token
    return ids


def _score(rows: list[Row], logits: Tensor, ids: list[int]) -> list[Score | None]:
    """Return the scores of new ids, for rows that asked for them."""
    scores: list[Score | None] = [None] * len(rows)
    places = [i for i, row in enumerate(rows) if row.request.logprobs is not None]
    if places:
        most = max(rows[i].request.logprobs or 0 for i in places)
        for i, score in zip(places, scores_of(logits[places], [ids[i] for i in places], most), strict=True):
            scores[i] = Score(score.logprob, score.top[: rows[i].request.logprobs])
    return scores
