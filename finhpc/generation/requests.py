"""What a batcher is asked, what it answers, and what it knows of a request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from finhpc.generation.blocks import Table
from finhpc.generation.sampling import Score, row_seed
from finhpc.settings.generate import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    `name`: unique among those that wait or run. `ids`: not empty. `stop`: ids that end it. `row`: its place in an
    input, which seeds its draws with `sampling.seed`. `logprobs`: how many of the most likely ids to score at each new
    id; None: not even that. `prompt_logprobs`: score the prompt's ids as well; `max_new_tokens` may be 0 then.
    """

    name: str
    ids: Sequence[int]
    adapter: str | None
    sampling: Sampling
    logprobs: int | None = None
    prompt_logprobs: bool = False
    score_from: int = 0
    stop: Collection[int] = ()
    row: int = 0


@dataclass(frozen=True)
class Token:
    """A new id of a request, or its end.

    `finish`: None if more will come, otherwise stop, length, cancelled or error. `prompt_logprobs`, with the first
    token of a request that asked: a score per id of its prompt from `score_from` on, None for the very first.
    """

    request: str
    id: int | None
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    prompt_logprobs: list[Score | None] | None = None


@dataclass(frozen=True)
class Stats:
    """Counts of requests, blocks and tokens. `prefix_hits`: tokens of prompts that were found and not computed."""

    waiting: int
    running: int
    blocks_total: int
    blocks_used: int
    blocks_shared: int
    preemptions: int
    prefix_hits: int
    tokens_in: int
    tokens_out: int


@dataclass(eq=False)
class Row:
    """A request that waits or runs. `new`: its tokens in the current pass."""

    request: Request
    adapter: int
    ids: list[int]
    draw: torch.Generator | None = None
    keys: list[bytes] = field(default_factory=list)
    table: Table = field(default_factory=Table)
    computed: int = 0
    new: int = 0
    scores: list[Score] = field(default_factory=list)  # of ids of the prompt from `scored` on

    @property
    def scored(self) -> int:
        """Place of the first id of the prompt that is scored; nothing comes before the very first."""
        return max(1, self.request.score_from)

    @property
    def shareable(self) -> int:
        """Tokens at the beginning whose hidden states are not needed, so that their blocks may be another request's."""
        return min(len(self.ids), self.scored if self.request.prompt_logprobs else len(self.ids)) - 1

    @property
    def prompt_scores(self) -> list[Score | None]:
        return [*([None] if self.request.score_from == 0 else []), *self.scores]

    @property
    def generated(self) -> int:
        return len(self.ids) - len(self.request.ids)

    def generator(self) -> torch.Generator:
        """Return what draws its ids, also after a preemption."""
        if self.draw is None:
            self.draw = torch.Generator().manual_seed(row_seed(self.request.sampling.seed, self.request.row))
        return self.draw

    @property
    def most(self) -> int:
        """Tokens that it may need blocks for."""
        return len(self.request.ids) + self.request.sampling.max_new_tokens
