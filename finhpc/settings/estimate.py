"""Settings of `finhpc estimate` and `finhpc estimate finetune`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import Section
from finhpc.settings.finetune import Base, FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig


class Hardware(Section):
    """The hardware that is planned for."""

    device: str = Field(
        "a100-80gb",
        description="v100-32gb, a100-40gb, a100-80gb, h100-80gb, h200-141gb, rtx-3090-24gb, rtx-4090-24gb, "
        "rtx-5090-32gb, rtx-a6000-48gb, rtx-6000-ada-48gb, l40s-48gb, l4-24gb, a10-24gb, t4-16gb, or this-machine "
        "(measured)",
    )
    nodes: int = Field(1, ge=1, description="machines")
    devices_per_node: int | None = Field(
        None, ge=1, description="devices of each; default: 8, on this machine its cores by resources.threads"
    )
    memory_gb: float | None = Field(None, gt=0, description="a device's memory; default: as its maker states")
    tflops: float | None = Field(None, gt=0, description="its matrix rate at train.precision; default: as stated")
    reached: float = Field(
        0.4,
        gt=0,
        le=1,
        description="share of that rate that training reaches; Table I's GPU hours of Llama 2 on A100s amount to "
        "0.38 to 0.43",
    )
    usable: float = Field(
        0.9, gt=0, le=1, description="share of the memory for tensors; the rest: libraries, fragments between tensors"
    )
    link_gb_per_s: float | None = Field(None, gt=0, description="to a device of the node, each way; default: as stated")
    network_gb_per_s: float | None = Field(None, gt=0, description="to a device of another node; default: as stated")


class Estimate(Hardware):
    """The hardware, and how it is planned for."""

    scheme: Literal["finhpc", "paper"] = Field(
        "finhpc",
        description="finhpc: what its engine holds, counted from its code; paper: 16-bit weights and gradients, 12 "
        "bytes of optimiser and Table IV's variables",
    )
    zero_stage: int = Field(
        0, ge=0, le=3, description="shares out optimiser (1), gradients (2), weights (3); paper only"
    )
    weight_bits: Literal[16, 8, 4] = Field(16, description="of the stored weights; paper only")
    samples_per_step: int | None = Field(
        None, ge=1, description="of the topologies compared; default: as `parallel` says"
    )
    micro_batch_sizes: list[int] = Field([1, 2, 4, 8, 16], min_length=1, description="sizes tried in the topologies")
    show: int = Field(10, ge=1, description="topologies shown")


class EstimateConfig(PretrainConfig):
    """Settings of `finhpc estimate`: those of the run, and the hardware."""

    estimate: Estimate = Field(default_factory=Estimate)


class PlannedBase(Base):
    """The base, of which the shape alone matters."""

    preset: str | None = Field(None, description="named shape in place of model.path; default: model.path's")


class Workload(Hardware):
    """The hardware, and the examples that are trained on, as far as memory and time depend on them."""

    tokens: int = Field(512, ge=2, description="tokens an example, prompt and answer")
    answer: int = Field(64, ge=1, description="of them the answer's, which predict")
    shared: int = Field(
        0, ge=0, description="of them those that all examples of a micro-batch begin with; computed once"
    )


class FinetuneEstimateConfig(FinetuneConfig):
    """Settings of `finhpc estimate finetune`: those of the run (no examples needed), and the hardware."""

    model: PlannedBase = Field(default_factory=PlannedBase)
    estimate: Workload = Field(default_factory=Workload)
