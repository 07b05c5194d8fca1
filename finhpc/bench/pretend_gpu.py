"""A GPU that is only pretended: code takes the paths it takes on CUDA, on a machine that has none.

Tensors on the device are on torch's meta device, which has shapes and no content, and say that they are on `cuda`. What
a build of torch for CPUs cannot do for them is done here as CUDA does it: autocast, the choice of an attention kernel,
and events. Only counting makes sense here, see `finhpc.bench.counts`: every number read from the device is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils

CUDA, META = torch.device("cuda", 0), torch.device("meta")
GET_DEVICE, GET_IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__  # type: ignore[attr-defined]
ALIGNED = 8  # numbers between the beginnings of a mask's rows
FLASH_HEAD = 256  # the largest head size of torch's flash kernel

# torch's autocast for CUDA (aten/src/ATen/autocast_mode.h), of the functions that models call: products in the low
# precision, the others in float32. For the last ones float32 is the type of the result; the kernel casts as it reads.
LOW = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "mv"}
HIGH = {"layer_norm", "group_norm", "nll_loss", "pow", "__pow__", "exp", "log", "rsqrt", "reciprocal", "softplus"}
HIGH_RESULT = {"softmax", "log_softmax", "sum", "prod", "cumsum"}


class PretendGpu(TorchFunctionMode):
    """Maps the device `cuda` to meta on the way in, and meta to `cuda` on the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, tuple[Tensor, Tensor]] = {}  # autocast's cache: of a parameter, its cast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == GET_DEVICE:
            device = func(*args)
            return CUDA if device.type == "meta" else device
        if func == GET_IS_CUDA:
            return bool(args[0].is_meta)
        name = getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":  # these only name a device
            return func(*args, **kwargs)
        if name in ("pin_memory", "is_pinned"):
            return args[0] if name == "pin_memory" else True
        if name == "cuda":
            return args[0].to(META, non_blocking=bool(kwargs.get("non_blocking")))
        kwargs.pop("pin_memory", None)
        there = any(_is_cuda(value) for value in (*args, *kwargs.values()))
        args = tuple(META if _is_cuda(value) else value for value in args)
        kwargs = {key: META if _is_cuda(value) else value for key, value in kwargs.items()}
        if there and func in (torch.tensor, torch.as_tensor):  # content is made on the CPU, then copied
            del kwargs["device"]
            return func(*args, **kwargs).to(META)
        if func is F.scaled_dot_product_attention:
            return attention(*self._lowered(args), **self._lowered(kwargs))
        if func is torch._fused_sdp_choice:
            return choice(*args, **kwargs).value
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = self._autocast(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _autocast(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if name in LOW:
            return self._lowered(args), self._lowered(kwargs)
        if name in HIGH or func is F.cross_entropy:
            return _cast(args, torch.float32), _cast(kwargs, torch.float32)
        if name in HIGH_RESULT and any(_floats(x) and x.is_meta for x in args) and kwargs.get("dtype") is None:
            return args, kwargs | {"dtype": torch.float32}
        return args, kwargs

    def _lowered(self, values: Any) -> Any:
        if not torch.is_autocast_enabled("cuda"):
            return values
        dtype = torch.get_autocast_dtype("cuda")
        if isinstance(values, dict):
            return {key: self._cached(value, dtype) for key, value in values.items()}
        return tuple(self._cached(value, dtype) for value in values)

    def _cached(self, value: Any, dtype: torch.dtype) -> Any:
        if not (_floats(value) and value.is_meta and value.dtype != dtype):
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self.casts:
            self.casts[id(value)] = value, value.to(dtype)
        return self.casts[id(value)][1]


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Pretend that torch has a GPU in the block."""
    mode, clear = PretendGpu(), torch.clear_autocast_cache
    devices = _foreach_utils._get_foreach_kernels_supported_devices

    def cleared() -> None:
        mode.casts.clear()
        clear()

    with ExitStack() as stack:
        for owner, name, value in (
            (torch, "clear_autocast_cache", cleared),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_: True),
            (_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: [*devices(), "meta"]),
            (torch.cuda, "Event", Event),
            (torch.cuda, "synchronize", lambda *_: waited("torch.cuda.synchronize")),
            (torch.cuda, "Stream", Stream),
            (Tensor, "record_stream", lambda *_: None),
            (torch.cuda, "stream", lambda _: nullcontext()),
            (torch.cuda, "current_stream", lambda *_: Stream()),
            (torch.cuda, "get_device_name", lambda *_: "a pretended GPU"),
            (torch.cuda, "reset_peak_memory_stats", lambda *_: None),
            (torch.cuda, "max_memory_allocated", lambda *_: 0),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(mode)
        yield


class Event:
    """A CUDA event of which every measurement is a millisecond."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waited("torch.cuda.Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Stream:
    """A CUDA stream on which nothing runs."""

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None:
        waited("torch.cuda.Stream.synchronize")


listeners: list[Callable[[str], None]] = []  # each is called with what the host waited for


def waited(what: str) -> None:
    for listener in listeners:
        listener(what)


def choice(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> SDPBackend:  # fmt: skip
    """The kernel that torch chooses on GPUs since Ampere."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and mask is None and query.shape[-1] <= FLASH_HEAD:
        return SDPBackend.FLASH_ATTENTION
    if query.shape[1] != key.shape[1]:  # only the flash kernel shares heads
        return SDPBackend.MATH
    return SDPBackend.EFFICIENT_ATTENTION


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's `scaled_dot_product_attention` on a GPU, by the kernel of `choice`."""
    kernel = choice(query, key, value, attn_mask)
    how: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if kernel == SDPBackend.FLASH_ATTENTION:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, **how)[0]  # type: ignore[no-any-return]
    if kernel == SDPBackend.EFFICIENT_ATTENTION:
        bias = None if attn_mask is None else _bias(attn_mask, query)
        needs_sums = any(x.requires_grad for x in (query, key, value))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, needs_sums, **how)[0]  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=enable_gqa, **how)


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """The mask as floats of the query's type, whose rows are aligned for the kernel."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf")).to(query.dtype)
    if mask.stride(-1) != 1 or any(stride % ALIGNED for stride in mask.stride()[:-1]):
        mask = F.pad(mask, (0, ALIGNED - mask.shape[-1] % ALIGNED))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], -1)


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.partition(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        return value.to(dtype) if _floats(value) and value.is_meta and value.dtype != dtype else value

    if isinstance(values, dict):
        return {key: one(value) for key, value in values.items()}
    return tuple(one(value) for value in values)
