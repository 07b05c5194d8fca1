"""What a training step costs besides arithmetic: launches, waits for the device, casts, and bytes.

Each operation that torch runs on the device is counted as it is dispatched, below autograd, so backward passes and the
optimizer count too. An operation on a list of tensors is one launch.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from finhpc.bench.pretend_gpu import listeners
from finhpc.bench.profile import kind_of

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # and launches nothing
FOLLOWED = 1 << 20  # elements of tensors whose content is followed
OVERWRITES = {"copy_", "fill_", "zero_"}  # without reading the tensor that they write
LOOKS_UP = {"embedding", "index_select", "gather", "index"}  # reads what it returns, of a larger tensor
INPUTS = "inputs"  # the kind of tensors that no operation of the step made
PACKAGES = ("finhpc", "transformers", "peft", "bitsandbytes", "deepspeed", "torch")
# What bitsandbytes does in Python inside one operation on CUDA, in its backends/cuda/ops.py, for inputs without
# outliers: (launches in addition to the operation's own, waits).
INSIDE = {"int8_vectorwise_quant": (3, 1)}
# Operations that are several others on CUDA too, by their default implementation.
COMPOSITE = {"gemm_4bit", "int8_mixed_scaled_mm", "int8_scaled_mm"}


@dataclass
class Counts:
    """The counts of some steps; bytes by kind of operation."""

    launches: Counter[str] = field(default_factory=Counter)  # by kind
    operations: Counter[str] = field(default_factory=Counter)  # launches by name
    waits: Counter[str] = field(default_factory=Counter)  # by place: the host waits for the device
    casts: int = 0
    cast_bytes: int = 0
    copies: int = 0  # between host and device
    moved: Counter[str] = field(default_factory=Counter)  # bytes read and written
    kept: Counter[str] = field(default_factory=Counter)  # bytes saved for backward, by the kind that made them

    def row(self) -> dict[str, int]:
        return {
            "launches": self.launches.total(),
            "synchronizations": self.waits.total(),
            "casts": self.casts,
            "copies": self.copies,
            "kept_bytes": self.kept.total(),
            "moved_bytes": self.moved.total(),
        }


class CountingMode(TorchDispatchMode):
    """Counts operations on the meta device, and answers for the device what depends on content.

    The content of small tensors of integers and conditions is followed, so that masks and layouts are those of the
    tokens. Every other number is 1, and every other condition false.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.made_by: dict[int, str] = {}  # storage -> kind of the operation that made it
        self.storages: dict[int, torch.UntypedStorage] = {}  # referenced, so that no other storage gets its address
        self.contents: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on = [x for x in inputs if x.is_meta]
        space, name = func.namespace, func._schema.name.partition("::")[2]
        if space == "c10d":
            return self._collective(func, args, kwargs)
        if name in ("_to_copy", "copy_") and (crossed := self._crossed(func, name, args, kwargs)) is not None:
            return crossed
        if on and _depends_on_content(func, name, args):
            self.waited(name)
            return self._by_content(func, name, args, kwargs)
        if name in COMPOSITE:
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        results = self._inside(name, args) if name in INSIDE else func(*args, **kwargs)
        made = [x for x in tree_leaves(results) if isinstance(x, Tensor) and x.is_meta]
        self._count(func, name, on, made)
        if func._schema.is_mutable:
            for x in on:
                self.contents.pop(x.untyped_storage()._cdata, None)
        elif made and not func.is_view:
            self._follow(func, args, kwargs, on, made)
        return results

    # -- launches, casts and bytes ----------------------------------------------------------

    def _count(self, func: Any, name: str, inputs: list[Tensor], made: list[Tensor]) -> None:
        counts, mutates = self.counts, func._schema.is_mutable
        known = {x.untyped_storage()._cdata for x in inputs}
        new = [x for x in made if x.untyped_storage()._cdata not in known]
        kind = kind_of(name)
        for x in new:
            storage = x.untyped_storage()
            self.made_by[storage._cdata], self.storages[storage._cdata] = kind, storage
        written = new or (made or inputs if mutates else [])
        if name == "_foreach_copy_":
            written, inputs = inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]
        if name in ALLOCATES or not any(x.numel() for x in written):
            return
        counts.launches[kind] += 1
        counts.operations[name] += 1
        read = sum(map(_bytes, new)) if name in LOOKS_UP else sum(map(_bytes, inputs))
        read -= _bytes(inputs[0]) if name in OVERWRITES else 0
        counts.moved[kind] += read + sum(map(_bytes, written))
        if name in ("_to_copy", "copy_", "_foreach_copy_") and inputs[-1].dtype != written[0].dtype:
            counts.casts += 1
            counts.cast_bytes += read + sum(map(_bytes, written))

    # -- waiting ----------------------------------------------------------------------------

    def waited(self, what: str) -> None:
        self.counts.waits[f"{what} at {_place()}"] += 1

    def _crossed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Copy between host and device; None if the copy is within one of them."""
        source = args[0] if name == "_to_copy" else args[1]
        to_meta = args[0].is_meta if name == "copy_" else _device(kwargs, source).type == "meta"
        if source.is_meta == to_meta:
            return None
        waits = source.numel() and not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if waits:
            self.waited("copy to the device" if to_meta else "copy from the device")
        self.counts.copies += 1
        if to_meta:
            result = func(*args, **kwargs)
            if not source.is_floating_point() and source.numel() <= FOLLOWED:
                self._remember(result, source)
            return result
        content = self._content(source)
        return args[0].copy_(content) if name == "copy_" else content.to(kwargs.get("dtype") or source.dtype)

    def _follow(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], made: list[Tensor]) -> None:
        """Compute small integers and conditions on the host too, if everything that they are made of is known."""
        if any(x.is_floating_point() or x.numel() > FOLLOWED for x in (*inputs, *made)):
            return
        if all(x.untyped_storage()._cdata in self.contents for x in inputs):
            if "device" in kwargs:
                kwargs = {**kwargs, "device": "cpu"}
            values = tree_leaves(func(*tree_map(self._on_host, args), **tree_map(self._on_host, kwargs)))
            for x, value in zip(made, [v for v in values if isinstance(v, Tensor)], strict=True):
                self._remember(x, value)

    def _on_host(self, value: Any) -> Any:
        return self._content(value) if isinstance(value, Tensor) and value.is_meta else value

    def _remember(self, tensor: Tensor, content: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.contents[storage._cdata], self.storages[storage._cdata] = content.detach().clone().flatten(), storage

    def _content(self, tensor: Tensor) -> Tensor:
        known = self.contents.get(tensor.untyped_storage()._cdata)
        if known is None:
            fill = tensor.dtype != torch.bool
            return torch.full(tensor.shape, fill, dtype=tensor.dtype, device="cpu")
        return known.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).clone()

    def _by_content(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Compute on the host what depends on content; results go back to the device."""
        args, kwargs = tree_map(
            lambda x: self._content(x) if isinstance(x, Tensor) and x.is_meta else x, (args, kwargs)
        )
        result = func(*args, **kwargs)

        def back(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            self._remember(tensor, value)
            return tensor

        return tree_map(back, result)

    def _inside(self, name: str, args: Any) -> Any:
        """bitsandbytes' int8 quantization of activations, none of which is an outlier."""
        launches, waits = INSIDE[name]
        x, threshold = args[0], args[1] if len(args) > 1 else 0.0
        codes = torch.empty(x.shape, dtype=torch.int8, device="meta")
        largest = torch.empty(x.shape[:-1].numel(), device="meta")
        if not threshold:
            return codes, largest, None
        self.counts.launches[kind_of(name)] += launches
        self.counts.operations[name] += launches
        for _ in range(waits):
            self.waited(name)
        return codes, largest, torch.empty(0, dtype=torch.int64, device="meta")

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A collective of this process alone changes nothing: it runs on a number in place of each tensor."""
        small = tree_map(lambda x: torch.zeros(1) if isinstance(x, Tensor) and x.is_meta else x, (args, kwargs))
        results = func(*small[0], **small[1])
        tensors = iter([x for x in tree_leaves(args[0]) if isinstance(x, Tensor)])
        return tree_map(lambda x: next(tensors, x) if isinstance(x, Tensor) else x, results)

    # -- counting ---------------------------------------------------------------------------

    def count(self, work: Callable[[], object], own: Iterable[Tensor]) -> Counts:
        """The counts of `work`; the storages of `own`, such as parameters, are not counted as kept for backward."""
        counts = self.counts = Counts()
        known = {tensor.untyped_storage()._cdata for tensor in own}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if tensor.is_meta and storage._cdata not in known:
                known.add(storage._cdata)
                self.storages[storage._cdata] = storage
                counts.kept[self.made_by.get(storage._cdata, INPUTS)] += storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            work()
        self.counts = Counts()
        return counts


@contextmanager
def counting() -> Iterator[CountingMode]:
    """Run the block in a `CountingMode`."""
    mode = CountingMode()
    listeners.append(mode.waited)
    try:
        with mode:
            yield mode
    finally:
        listeners.remove(mode.waited)


def _depends_on_content(func: Any, name: str, args: Any) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # by a mask, which is looked through first
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _device(kwargs: Any, source: Tensor) -> torch.device:
    device = kwargs.get("device")
    return torch.device(device) if device is not None else torch.device("meta" if source.is_meta else "cpu")


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _place() -> str:
    """The innermost line outside torch and this package that runs."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        parts = path.parts
        package = next((name for name in PACKAGES if name in parts), None)
        if package is not None and package != "torch" and "bench" not in parts[-2:]:
            return f"{package}/{'/'.join(parts[len(parts) - parts[::-1].index(package) :])}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"
