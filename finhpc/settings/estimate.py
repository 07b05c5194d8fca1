"""Settings of `finhpc estimate` and `finhpc estimate finetune`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finhpc.settings.base import Section
from finhpc.settings.finetune import Base, FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig


class Hardware(Section):
    """The hardware to plan for."""

    device: str = Field(
        "a100-80gb",
        description="v100-32gb, a100-40gb, a100-80gb, h100-80gb, h200-141gb, rtx-3090-24gb, rtx-4090-24gb, "
        "rtx-5090-32gb, rtx-a6000-48gb, rtx-6000-ada-48gb, l40s-48gb, l4-24gb, a10-24gb, t4-16gb, or this-machine, "
        "which is measured",
    )
    nodes: int = Field(1, ge=1, description="number of machines")
    devices_per_node: int | None = Field(
        None,
        ge=1,
        description="devices per machine; default: 8; on this machine: its cores divided by resources.threads",
    )
    memory_gb: float | None = Field(None, gt=0, description="memory per device; default: the data sheet's")
    tflops: float | None = Field(
        None, gt=0, description="matrix multiplication rate at train.precision; default: the data sheet's"
    )
    reached: float = Field(
        0.4,
        gt=0,
        le=1,
        description="share of that rate that training reaches; Table I implies 0.38 to 0.43 for Llama 2 on A100s",
    )
    usable: float = Field(
        0.9, gt=0, le=1, description="share of the memory for tensors; libraries and fragmentation take the rest"
    )
    link_gb_per_s: float | None = Field(
        None, gt=0, description="bandwidth to a device of the same node, each way; default: the data sheet's"
    )
    network_gb_per_s: float | None = Field(
        None, gt=0, description="bandwidth to a device of another node; default: the data sheet's"
    )


class Estimate(Hardware):
    """The hardware, and how to count."""

    scheme: Literal["finhpc", "paper"] = Field(
        "finhpc",
        description="finhpc: memory of its engine, counted from its code; paper: 16-bit weights and gradients, 12 "
        "bytes of optimizer state per weight, and the variables of Table IV",
    )
    zero_stage: int = Field(
        0, ge=0, le=3, description="sharding of optimizer state (1), gradients (2), weights (3); paper only"
    )
    weight_bits: Literal[16, 8, 4] = Field(16, description="bits of the stored weights; paper only")
    samples_per_step: int | None = Field(
        None, ge=1, description="samples per step of the topologies; default: as in `parallel`"
    )
    micro_batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 4, 8, 16], min_length=1, description="micro-batch sizes to compare"
    )
    show: int = Field(10, ge=1, description="number of topologies to show")


class EstimateConfig(PretrainConfig):
    """Settings of `finhpc estimate`: those of `finhpc pretrain`, and the hardware."""

    estimate: Estimate = Field(default_factory=Estimate)

    def problems(self) -> list[str]:
        """Return every contradiction between settings, each with its remedy."""
        wanted, problems = self.estimate, self.parallel.problems()
        problems += self.method.problems(self.train.steps, self.optimizer)
        if wanted.scheme == "finhpc" and wanted.zero_stage:
            problems.append(
                f"estimate.zero_stage={wanted.zero_stage} does not exist in finhpc's training; use "
                "parallel.shard_optimizer=true, which divides the optimizer's state as the paper's 1 does, or "
                "estimate.scheme=paper."
            )
        if wanted.scheme == "paper" and wanted.zero_stage > 1 and self.parallel.stages > 1:
            problems.append(
                f"estimate.zero_stage={wanted.zero_stage} with parallel.stages={self.parallel.stages}: a pipeline does "
                "not divide gradients and weights; use 0 or 1, or one stage."
            )
        if wanted.scheme == "paper" and self.parallel.schedule != "1f1b":
            problems.append(
                f"estimate.scheme=paper counts the paper's schedule, not parallel.schedule={self.parallel.schedule}; "
                "use 1f1b, or estimate.scheme=finhpc."
            )
        if wanted.scheme == "finhpc" and wanted.weight_bits != 16:
            problems.append(
                f"estimate.weight_bits={wanted.weight_bits} does not exist in finhpc's training, whose weights are "
                "float32; use estimate.scheme=paper."
            )
        return problems


class PlannedBase(Base):
    """The frozen model, of which only the shape matters."""

    preset: str | None = Field(
        None, description="named shape to use without model.path; default: the shape of model.path"
    )


class Workload(Hardware):
    """The hardware, and the sizes of the examples."""

    tokens: int = Field(512, ge=2, description="tokens per example, prompt and answer")
    answer: int = Field(64, ge=1, description="tokens of the answer, which count for the loss")
    shared: int = Field(
        0, ge=0, description="tokens of a prefix that all examples of a micro-batch share; computed once"
    )


class FinetuneEstimateConfig(FinetuneConfig):
    """Settings of `finhpc estimate finetune`: those of `finhpc finetune` (no examples needed), and the hardware."""

    model: PlannedBase = Field(default_factory=PlannedBase)
    estimate: Workload = Field(default_factory=Workload)

    def problems(self) -> list[str]:
        """Return every contradiction between settings, each with its remedy."""
        work, problems = self.estimate, super().problems()
        if work.shared + work.answer >= work.tokens:
            problems.append(
                f"estimate.shared={work.shared} and estimate.answer={work.answer} leave nothing of estimate.tokens="
                f"{work.tokens}, which is the sum of the shared beginning, the rest of the prompt and the answer; "
                "raise it."
            )
        return problems
