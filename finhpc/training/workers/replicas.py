"""What the replicas of a stage do together: average gradients, and divide the optimizer's work and state.

Parameters and gradients are whole on every replica. With `parallel.shard_optimizer` a replica updates only its share
of the rows, for which alone it has moments, and then sends them to the others. torch's `ZeroRedundancyOptimizer`
divides by whole tensors, so a large embedding would leave most of the state on one replica; rows balance within 1 %.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import accumulate
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Rows = slice | None  # of a tensor's first dimension; None: all of the tensor
Share = dict[str, Rows]  # Hugging Face name -> the rows that one replica updates and stores

BUCKET_BYTES = 25 << 20  # tensors up to this size travel together; larger ones alone
ALIGNMENT = 64  # elements; vector instructions then group a part's elements as they group those of the whole


def rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    """A view of those rows."""
    return tensor if rows is None else tensor[rows]


def divide(
    parameters: Mapping[str, Tensor],
    replicas: int,
    by_rows: Collection[str],
    unit_of: Callable[[str], str] = lambda name: name,
) -> list[Share]:
    """The share of each replica, equal in elements.

    Parameters that are not named in `by_rows` are dealt out whole, those with the same `unit_of` to one replica: the
    largest first, each to the replica that has least. Those that are named fill the shares up: laid end to end, they
    are divided into contiguous parts, whose borders may lie between two rows of a tensor.
    """
    shares: list[Share] = [{} for _ in range(replicas)]
    held, units = [0] * replicas, dict[str, list[str]]()
    for name in sorted(parameters.keys() - set(by_rows)):
        units.setdefault(unit_of(name), []).append(name)
    sizes = {unit: sum(parameters[name].numel() for name in names) for unit, names in units.items()}
    for unit in sorted(units, key=lambda unit: (-sizes[unit], unit)):
        least = held.index(min(held))
        shares[least] |= dict.fromkeys(units[unit])
        held[least] += sizes[unit]
    rest = {name: parameter for name, parameter in parameters.items() if name in by_rows}
    begin, borders = 0, _borders(sum(parameter.numel() for parameter in rest.values()), held)
    for name, parameter in rest.items():
        rows = len(parameter) if parameter.dim() else 1
        ends = [_nearest_row(border - begin, rows, parameter.numel() // rows) for border in borders]
        for share, start, stop in zip(shares, [0, *ends], [*ends, rows], strict=True):
            if stop > start:
                share[name] = None if stop - start == rows else slice(start, stop)
        begin += parameter.numel()
    return shares


def _borders(total: int, held: list[int]) -> list[float]:
    """Where so many elements are divided, so that each replica has as many as the others with what it holds."""
    level, filled = 0.0, sorted(held)
    for count in range(len(filled), 0, -1):  # those that hold more than the level get none
        level = (total + sum(filled[:count])) / count
        if filled[count - 1] <= level:
            break
    ends = list(accumulate(max(0.0, level - own) for own in held))
    return ends[:-1]


def _nearest_row(element: float, rows: int, per_row: int) -> int:
    """The row nearest to an element of the flat tensor at which it may be divided, from 0 to the number of rows."""
    unit = ALIGNMENT // gcd(ALIGNMENT, per_row)
    return max(0, min(rows, round(element / per_row / unit) * unit))


class ShardedStep:
    """The rows of a replica's share as parameters of their own, for its optimizer: views of the whole parameters.

    `updated`: Hugging Face name -> those rows; a parameter that has one owner is itself.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], shares: list[Share], replica: int, group: Any) -> None:
        self.shares, self.group = shares, group
        self.own = shares[replica]
        self.updated = {
            name: parameters[name] if rows is None else nn.Parameter(rows_of(parameters[name].detach(), rows))
            for name, rows in self.own.items()
        }

    def share_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the own rows their gradients, before the optimizer's step."""
        for name, part in self.updated.items():
            grad = parameters[name].grad
            part.grad = None if grad is None else rows_of(grad, self.own[name])

    def exchange(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Send the updated rows to the other replicas and receive theirs, after the optimizer's step."""
        for name, part in self.updated.items():
            if self.own[name] is not None:
                part.grad = None
        works = []
        for owner, share in enumerate(self.shares):
            tensors = [rows_of(parameters[n].detach(), rows) for n, rows in share.items() if n in parameters]
            for tensor in tensors:
                if tensor.nbytes > BUCKET_BYTES:
                    works.append(dist.broadcast(tensor, group=self.group, group_src=owner, async_op=True))
            small = [tensor for tensor in tensors if tensor.nbytes <= BUCKET_BYTES]
            if small:
                dist._broadcast_coalesced(self.group, small, BUCKET_BYTES, owner)  # type: ignore[attr-defined]
        for work in works:
            work.wait()  # type: ignore[union-attr]


class GradientAverager:
    """Averages gradients over the replicas of a stage, while the last backward pass still computes others.

    Gradients travel in buckets, in the same order on every replica. A bucket is sent when each of its gradients has
    been added to for the last time in the step: as often as in the first step, after which all are sent at the end.
    `late`: parameters that are sent at the end of every step, because something is added to their gradients there.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: Any, late: Collection[nn.Parameter] = ()) -> None:
        self.group, self.replicas = group, dist.get_world_size(group)
        held = {id(parameter) for parameter in late}
        # The backward pass reaches the last layers first.
        order = list(reversed(list(parameters)))
        early = _buckets([parameter for parameter in order if id(parameter) not in held])
        self._buckets = [*early, *_buckets([parameter for parameter in order if id(parameter) in held])]
        self._early = len(early)
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}
        self._expected: Counter[nn.Parameter] | None = None  # additions to each gradient in a step
        self._works: list[Any] = []
        self._begin()
        self._hooks = [p.register_post_accumulate_grad_hook(self._added) for p in self._bucket_of]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self) -> None:
        self._seen: Counter[nn.Parameter] = Counter()
        self._missing = [len(bucket) for bucket in self._buckets]

    def _added(self, parameter: Tensor) -> None:
        """Called by autograd when it has added to the gradient of a parameter."""
        assert isinstance(parameter, nn.Parameter)
        self._seen[parameter] += 1
        if self._expected is None or self._seen[parameter] < self._expected[parameter]:
            return
        bucket = self._bucket_of[parameter]
        if bucket < len(self._works) or self._seen[parameter] > self._expected[parameter]:
            raise RuntimeError(
                f"a gradient of shape {tuple(parameter.shape)} was added to {self._seen[parameter]} times in this "
                f"step, and {self._expected[parameter]} times in the steps before, after which it is averaged."
            )
        self._missing[bucket] -= 1
        while len(self._works) < self._early and not self._missing[len(self._works)]:
            self._send()

    def _send(self) -> None:
        """Start the sum of the next bucket."""
        bucket = self._buckets[len(self._works)]
        for parameter in bucket:
            if parameter.grad is None:  # it has one on another replica, perhaps
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in bucket]
        if len(grads) == 1:
            self._works.append(dist.all_reduce(grads[0], group=self.group, async_op=True))
            return
        options = dist.distributed_c10d.AllreduceCoalescedOptions()
        options.asyncOp = True
        self._works.append(self.group.allreduce_coalesced(grads, options))

    def finish(self) -> None:
        """Send what was not sent yet, and wait until every gradient is the mean over the replicas."""
        while len(self._works) < len(self._buckets):
            self._send()
        for work in self._works:
            work.wait()
        grads = [parameter.grad for parameter in self._bucket_of]
        torch._foreach_mul_(grads, 1 / self.replicas)  # type: ignore[arg-type]
        if self._expected is None:
            self._expected = self._seen
        self._works = []
        self._begin()


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Consecutive parameters in groups of at most BUCKET_BYTES, or of one parameter."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not buckets or size + parameter.nbytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets
