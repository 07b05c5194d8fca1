"""The batches of a finetuning in its order: packs of examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from finhpc.data.ahead import ahead
from finhpc.data.examples.batches import Batches, MicroBatch
from finhpc.data.examples.choices.candidates import Candidates
from finhpc.data.examples.examples import Examples
from finhpc.training.batches import Batch, Ints


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
        packs, places = _in_packs(packing.held_out(held_out.take(ids), replica))
        return packs, [ids[i] for i in places]

    def pairs(self, replica: int, split: str, limit: int | None = None) -> tuple[list[Ints], list[int]]:
        """A replica's packs of the first `limit` examples of a split, and these examples in order."""
        return _in_packs(self.packing.held_out(getattr(self.examples, split), replica, limit))

    def filler(self) -> tuple[int, Tensor | None]:
        return 0, None

    def tokens(self, step: int) -> int:
        epochs, rest = divmod(step * self.packing.parallel.samples_per_step, len(self.examples.train))
        if epochs not in self._begun:
            lengths = np.diff(self.examples.train.offsets)[self.packing.order(len(self.examples.train), epochs)]
            self._begun.clear()
            self._begun[epochs] = np.concatenate([[0], np.cumsum(lengths)])
        return epochs * int(self._begun[epochs][-1]) + int(self._begun[epochs][rest])


def _in_packs(batches: list[MicroBatch]) -> tuple[list[Ints], list[int]]:
    return [batch["pack"] for batch in batches], [i for batch in batches for i in batch["sample"].tolist()]
