"""Devices by name, with what their makers state, and this machine, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """One worker's share of the hardware. Rates are peaks; decimal units."""

    name: str
    memory_gb: float
    tflops: dict[str, float]  # precision -> dense matrix products
    memory_gb_per_s: float
    link_gb_per_s: float  # to a neighbour in the node, each way
    network_gb_per_s: float  # to another node, each way
    launch_s: float = 0.0  # the least that one part's passes over a micro-batch take: kernels must be launched

    def said(self, precision: str, reached: float) -> str:
        """At what rate a time was reckoned, in words."""
        rate = f"{self.tflops[precision]:.3g} TFLOP/s {'measured' if self.name == THIS_MACHINE else 'stated'}"
        least = f", launching {1e3 * self.launch_s:g} ms a part at least" if self.launch_s else ""
        return f"at {reached:.0%} of {rate} for matrix products ({self.name}){least}"

    def rate(self, precision: str) -> float:
        """Operations a second of matrix products, two for a multiplication and its addition."""
        return self.tflops[precision] * 1e12


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices. `usable`: bytes of each for tensors; `reached`: share of its matrix rate."""

    device: Device
    nodes: int
    devices_per_node: int
    usable: float
    reached: float
    precision: str

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


# NVIDIA's data sheets "Tesla V100" (2020), "A100 80GB" (2021), "H100" (2023) and "H200" (2024), the SXM boards;
# tensor-core rates without sparsity (those of H100 and H200 are printed with it: 1,979), NVLink's total halved.
# The network is that of the maker's DGX servers: four 100 Gb/s cards for 8 GPUs (DGX-1; DGX-2 has eight for 16),
# eight of 200 Gb/s for 8 (DGX A100), eight of 400 Gb/s for 8 (DGX H100, DGX H200).
# finhpc multiplies float32 in full precision, so TF32 is not counted; a V100 has no bfloat16, its rate is float16's.

# Measured on one H100 with 16 cores, beside other runs: a 6 x 384 GPT-2, 16 parts, 1,024 tokens, takes 16 ms at best.
LAUNCH_S = 1e-3
DEVICES = {
    device.name: replace(device, launch_s=LAUNCH_S)
    for device in (
        Device("v100-32gb", 32, {"fp32": 15.7, "bf16": 125}, 900, 150, 6.25),
        Device("a100-40gb", 40, {"fp32": 19.5, "bf16": 312}, 1555, 300, 25),
        Device("a100-80gb", 80, {"fp32": 19.5, "bf16": 312}, 2039, 300, 25),
        Device("h100-80gb", 80, {"fp32": 67, "bf16": 989}, 3350, 450, 50),
        Device("h200-141gb", 141, {"fp32": 67, "bf16": 989}, 4800, 450, 50),
    )
}
THIS_MACHINE = "this-machine"
REACHED = 0.4  # share of a GPU's matrix rate: what the GPU hours of Llama 2 (Table I) amount to on A100s, 0.38 to 0.43
CPU_REACHED = 0.5  # of this machine's measured rate: an assumption, not a measurement; a dry run calls its time rough

SIZE = 1024  # of the matrices multiplied to measure a rate
SECONDS = 0.3  # spent on each measurement


def this_machine(workers: int, threads: int) -> Device:
    """This machine's CPU, shared by `workers` processes of `threads` threads.

    Rates are measured now, with the threads of one worker while the others rest, by the seconds that these compute,
    so that other processes do not change them; memory is the whole machine's by workers; what workers exchange is
    copied once, at memory's speed.
    """
    import psutil

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rates = {name: _products(dtype, threads) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
        copies = _copies(threads)
    finally:
        torch.set_num_threads(before)
    return Device(THIS_MACHINE, psutil.virtual_memory().total / workers / 1e9, rates, 2 * copies, copies, copies)


def gpu_here() -> Device | None:
    """This machine's first GPU, where its data sheet is known here; by series and the nearest memory."""
    name = torch.cuda.get_device_name().lower()
    total = torch.cuda.get_device_properties(0).total_memory
    alike = [device for device in DEVICES.values() if device.name.partition("-")[0] in name]
    return min(alike, key=lambda device: abs(device.memory_gb * 1e9 - total), default=None)


def _products(dtype: torch.dtype, threads: int) -> float:
    """TFLOP/s of square matrix products."""
    a = torch.randn(SIZE, SIZE).to(dtype)
    return 2 * SIZE**3 * _times_a_second(lambda: torch.mm(a, a), threads) / 1e12


def _copies(threads: int) -> float:
    """GB/s of copying a tensor larger than the caches."""
    source = torch.zeros(1 << 26)
    target = torch.empty_like(source)
    return source.numel() * 4 * _times_a_second(lambda: target.copy_(source), threads) / 1e9


def _times_a_second(work: Callable[[], object], threads: int) -> float:
    work()
    count, start = 0, time.process_time()
    while (spent := (time.process_time() - start) / threads) < SECONDS:
        work()
        count += 1
    return count / spent
