"""The batches of a run in its order: blocks of tokens, or packs of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from finhpc.data.ahead import ahead
from finhpc.settings.training import Parallel

if TYPE_CHECKING:
    from finhpc.data.examples.batches import Batches
    from finhpc.data.examples.choices.candidates import Candidates
    from finhpc.data.examples.examples import Examples

MicroBatch = dict[str, Any]  # int64: tokens (micro_batch_size, seq_len), sample and position (micro_batch_size,)
OpenStream = Callable[[int, int], Iterator[MicroBatch]]  # (first step, replica) -> micro-batches
Ints = np.ndarray[Any, np.dtype[np.int64]]


class Batch(NamedTuple):
    """A micro-batch: the engine's input, its samples' ids, and their positions in the run over all replicas."""

    inputs: Tensor
    samples: Ints
    positions: Ints


class BatchSource(Protocol):
    """The data of a run."""

    @property
    def scored(self) -> int:
        """The number of held-out samples of an evaluation, over all replicas."""
        ...

    def stream(self, step: int, replica: int) -> Iterator[Batch]:
        """The micro-batches of a replica after `step`, made one step ahead; only first stages call this."""
        ...

    def held_out(self, replica: int) -> list[Tensor]:
        """The micro-batches of an evaluation, equally many for each replica."""
        ...

    def filler(self) -> tuple[int, Tensor | None]:
        """The number of copies of the last sample that fill up `held_out`, and a micro-batch of such copies."""
        ...

    def tokens(self, step: int) -> int:
        """The number of tokens in the first `step` steps, without padding."""
        ...


class TokenBatches:
    """Samples of `seq_len` tokens. `val`: int64 (samples, seq_len), the same on every worker."""

    def __init__(self, parallel: Parallel, open_stream: OpenStream, val: Ints) -> None:
        self.parallel, self.open_stream, self.val = parallel, open_stream, val
        self.scored = len(val)

    def stream(self, step: int, replica: int) -> Iterator[Batch]:
        for batch in ahead(self.open_stream(step, replica), self.parallel.micro_batches):
            yield Batch(torch.from_numpy(batch["tokens"]), batch["sample"], batch["position"])

    def held_out(self, replica: int) -> list[Tensor]:
        copies, _ = self.filler()
        share = (self.scored + copies) // self.parallel.replicas
        indices = np.minimum(np.arange(replica * share, (replica + 1) * share), self.scored - 1)
        return list(torch.from_numpy(self.val[indices]).split(self.parallel.micro_batch_size))

    def filler(self) -> tuple[int, Tensor | None]:
        copies = -self.scored % (self.parallel.micro_batch_size * self.parallel.replicas)
        return copies, torch.from_numpy(self.val[-1:].repeat(self.parallel.micro_batch_size, 0)) if copies else None

    def tokens(self, step: int) -> int:
        return step * self.parallel.samples_per_step * int(self.val.shape[1])


@dataclass(frozen=True)
class PackedBatches:
    """Examples; each micro-batch is one pack. `limit`: held-out examples of an evaluation; None for all.

    `labels`: what `choices` chooses among.
    """

    examples: Examples
    packing: Batches
    limit: int | None = None
    labels: Candidates | None = None
    _begun: dict[int, Ints] = field(default_factory=dict)  # epoch -> tokens of its first 0, 1, 2, ... examples

    @property
    def scored(self) -> int:
        number = len(self.examples.held_out)
        return number if self.limit is None else min(number, self.limit)

    def stream(self, step: int, replica: int) -> Iterator[Batch]:
        packs = self.packing.stream(self.examples.train, replica, step)
        for batch in ahead(packs, self.packing.parallel.micro_batches):
            yield Batch(torch.from_numpy(batch["pack"]), batch["sample"], batch["position"])

    def held_out(self, replica: int) -> list[Tensor]:
        batches = self.packing.held_out(self.examples.held_out, replica, self.limit)
        return [torch.from_numpy(batch["pack"]) for batch in batches]

    def choices(self, replica: int) -> tuple[list[Ints], list[int]]:
        """A replica's packs in which held-out examples with labels choose among them, and these examples in order."""
        assert self.labels is not None
        held_out = self.examples.held_out
        ids = [i for i in range(self.scored) if int(held_out.source[i]) in self.labels.answers]
        packing = replace(self.packing, candidates=self.labels)
        batches = packing.held_out(held_out.take(ids), replica)
        return [batch["pack"] for batch in batches], [ids[i] for batch in batches for i in batch["sample"].tolist()]

    def filler(self) -> tuple[int, Tensor | None]:
        return 0, None

    def tokens(self, step: int) -> int:
        epochs, rest = divmod(step * self.packing.parallel.samples_per_step, len(self.examples.train))
        if epochs not in self._begun:
            lengths = np.diff(self.examples.train.offsets)[self.packing.order(len(self.examples.train), epochs)]
            self._begun.clear()
            self._begun[epochs] = np.concatenate([[0], np.cumsum(lengths)])
        return epochs * int(self._begun[epochs][-1]) + int(self._begun[epochs][rest])
