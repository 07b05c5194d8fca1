"""The time of a training step by kind of operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first kind with a word in the operation's name takes it.
KINDS = {
    "optimizer": ("adam",),
    "fused attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
    "matrix products": ("mm", "linear", "matmul", "gemm", "cutlass", "nvjet"),
    "softmax and loss": ("softmax", "nll_loss", "InPlaceCrossEntropy", "gather", "scatter", "amax"),
    "activation": ("gelu", "silu", "tanh", "pow"),
    "norms": ("norm",),
    "embedding": ("embedding", "index"),
    "zero fills": ("zero", "fill"),
    "copies and casts": ("copy", "clone", "cat", "contiguous", "Memcpy", "_to_copy"),
    "sums and products": ("add", "mul", "sub", "div", "sum"),
}
REST = "rest"


def kind_of(operation: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), REST)


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Kind of operation -> share of the time of one `step` (of the GPU's time there), profiled after another."""
    step()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        step()
    took = dict.fromkeys([*KINDS, REST], 0.0)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # operations; the kernels of a GPU are listed again
            took[kind_of(event.key)] += event.self_device_time_total if cuda else event.self_cpu_time_total
    whole = sum(took.values())
    return {kind: time / whole for kind, time in took.items()}
