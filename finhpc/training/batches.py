"""The batches of a run in its order: blocks of tokens. Packs of examples are in `finhpc.training.finetuning`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from finhpc.data.ahead import ahead
from finhpc.settings.training import Parallel

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
