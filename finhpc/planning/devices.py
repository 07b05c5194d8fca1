"""Devices by name, with what their makers state, and this machine, measured."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

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
    launch_s: float = 0.0  # the minimum for one part's passes over a micro-batch: its kernels must be launched

    def describe_rate(self, precision: str, reached: float) -> str:
        """The rate that times were calculated with, in words."""
        rate = f"{self.tflops[precision]:.3g} TFLOP/s {'measured' if self.name == THIS_MACHINE else 'stated'}"
        least = f", at least {1e3 * self.launch_s:g} ms per part for launching" if self.launch_s else ""
        return f"at {reached:.0%} of {rate} for matrix products ({self.name}){least}"

    def rate(self, precision: str) -> float:
        """Operations per second of matrix products; a multiplication and its addition are two."""
        return self.tflops[precision] * 1e12


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices. `usable`: bytes of each for tensors; `reached`: the share of its matrix rate."""

    device: Device
    nodes: int
    devices_per_node: int
    usable: float
    reached: float
    precision: str

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def link(self, workers: int) -> float:
        """Bytes per second between two of so many workers: in a node if they fit one, else over the network."""
        one_node = workers <= self.devices_per_node
        return (self.device.link_gb_per_s if one_node else self.device.network_gb_per_s) * 1e9


# NVIDIA's data sheets "Tesla V100" (2020), "A100 80GB" (2021), "H100" (2023) and "H200" (2024), the SXM boards;
# tensor-core rates without sparsity (those of H100 and H200 are printed with it: 1,979), NVLink's total halved.
# The network is that of the maker's DGX servers: four 100 Gb/s cards for 8 GPUs (DGX-1; DGX-2 has eight for 16),
# eight of 200 Gb/s for 8 (DGX A100), eight of 400 Gb/s for 8 (DGX H100, DGX H200).
# finhpc multiplies float32 in full precision, so TF32 is not counted; a V100 has no bfloat16, its rate is float16's.

# Workstations and small servers: the data sheets and architecture white papers of the GeForce RTX 30, 40 and 50 series,
# RTX A6000, RTX 6000 Ada, L40S, L4, A10 and T4; bf16 with float32 accumulation, without sparsity. Between devices: PCIe
# 4.0 x16 (5.0 of the RTX 5090, 3.0 of the T4, x8 of the L4's 4.0), NVLink of the RTX 3090 and A6000. Network: 10 Gb/s,
# an assumption. A T4 has no bfloat16, its rate is float16's.

# Measured on one H100 with 16 cores: the best step of a 6 x 384 GPT-2 (16 parts, 1,024 tokens) takes 16 ms.
LAUNCH_S = 1e-3
DEVICES = {
    device.name: replace(device, launch_s=LAUNCH_S)
    for device in (
        Device("v100-32gb", 32, {"fp32": 15.7, "bf16": 125}, 900, 150, 6.25),
        Device("a100-40gb", 40, {"fp32": 19.5, "bf16": 312}, 1555, 300, 25),
        Device("a100-80gb", 80, {"fp32": 19.5, "bf16": 312}, 2039, 300, 25),
        Device("h100-80gb", 80, {"fp32": 67, "bf16": 989}, 3350, 450, 50),
        Device("h200-141gb", 141, {"fp32": 67, "bf16": 989}, 4800, 450, 50),
        Device("rtx-3090-24gb", 24, {"fp32": 35.6, "bf16": 71}, 936, 56, 1.25),
        Device("rtx-4090-24gb", 24, {"fp32": 82.6, "bf16": 165}, 1008, 32, 1.25),
        Device("rtx-5090-32gb", 32, {"fp32": 104.8, "bf16": 209}, 1792, 64, 1.25),
        Device("rtx-a6000-48gb", 48, {"fp32": 38.7, "bf16": 154.8}, 768, 56, 1.25),
        Device("rtx-6000-ada-48gb", 48, {"fp32": 91.1, "bf16": 364}, 960, 32, 1.25),
        Device("l40s-48gb", 48, {"fp32": 91.6, "bf16": 362}, 864, 32, 1.25),
        Device("l4-24gb", 24, {"fp32": 30.3, "bf16": 121}, 300, 16, 1.25),
        Device("a10-24gb", 24, {"fp32": 31.2, "bf16": 125}, 600, 32, 1.25),
        Device("t4-16gb", 16, {"fp32": 8.1, "bf16": 65}, 320, 16, 1.25),
    )
}
THIS_MACHINE = "this-machine"
REACHED = 0.4  # share of a GPU's matrix rate; the GPU hours of Llama 2 (Table I) are 0.38 to 0.43 on A100s
CPU_REACHED = 0.5  # share of this machine's measured rate: an assumption; a dry run calls its time rough

SIZE = 1024  # of the matrices that are multiplied to measure a rate
SECONDS = 0.3  # of each measurement


def this_machine(workers: int, threads: int) -> Device:
    """This machine's CPU, shared by `workers` processes of `threads` threads.

    Memory is the machine's divided by the workers; exchanges between workers are copied once, at memory speed.
    """
    import psutil

    rates, copies = _rates(threads)
    return Device(THIS_MACHINE, psutil.virtual_memory().total / workers / 1e9, rates, 2 * copies, copies, copies)


def gpu_here() -> Device | None:
    """This machine's first GPU, found by its series and nearest memory; None if it is not in the table above."""
    return device_called(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)


def device_called(name: str, memory: int) -> Device | None:
    """The device with the name that a driver reports, and the nearest memory in bytes; None if it is not known."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if "laptop" in words:  # slower, under the same number
        return None
    alike = [device for device in DEVICES.values() if words >= set(device.name.split("-")[:-1])]
    return min(alike, key=lambda device: abs(device.memory_gb * 1e9 - memory), default=None)


@cache
def _rates(threads: int) -> tuple[dict[str, float], float]:
    """TFLOP/s of square matrix products by precision, and GB/s of copying a tensor larger than the caches.

    Measured once per process, in CPU seconds, so that other processes do not change them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tflops = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.randn(SIZE, SIZE).to(dtype)
            tflops[name] = 2 * SIZE**3 * _times_per_second(lambda a=a: torch.mm(a, a), threads) / 1e12  # type: ignore[misc]
        source = torch.zeros(1 << 26)
        target = torch.empty_like(source)
        return tflops, source.numel() * 4 * _times_per_second(lambda: target.copy_(source), threads) / 1e9
    finally:
        torch.set_num_threads(before)


def _times_per_second(work: Callable[[], object], threads: int) -> float:
    work()
    count, start = 0, time.process_time()
    while (spent := (time.process_time() - start) / threads) < SECONDS:
        work()
        count += 1
    return count / spent
