"""Devices by name: those on a desk too, found by what their driver calls them."""

from __future__ import annotations

import pytest

import finhpc
from finhpc.cli import main
from finhpc.planning.devices import DEVICES, device_called
from finhpc.settings.base import build
from finhpc.settings.estimate import EstimateConfig, Hardware


@pytest.mark.parametrize(
    ("called", "gigabytes", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 85, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 42, "a100-40gb"),
        ("NVIDIA A10", 24, "a10-24gb"),
        ("NVIDIA H200", 150, "h200-141gb"),
        ("Tesla V100-SXM2-32GB", 34, "v100-32gb"),
        ("NVIDIA GeForce RTX 4090", 25, "rtx-4090-24gb"),
        ("NVIDIA RTX A6000", 51, "rtx-a6000-48gb"),
        ("NVIDIA RTX 6000 Ada Generation", 51, "rtx-6000-ada-48gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 17, None),
        ("NVIDIA GeForce GTX 1080", 8, None),
    ],
)
def test_a_device_by_its_drivers_name(called: str, gigabytes: int, name: str | None) -> None:
    found = device_called(called, gigabytes * 10**9)
    assert (found and found.name) == name


def test_help_lists_every_device() -> None:
    description = str(Hardware.model_fields["device"].description)
    assert all(name in description for name in DEVICES)


def test_an_unknown_device_says_how_to_describe_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--estimate.device", "gaudi3"]) == 2
    found = capsys.readouterr().err
    assert "estimate.device=gaudi3 is not known; valid: " in found
    assert "--estimate.memory_gb, --estimate.tflops" in found


def test_what_is_assumed_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    result = finhpc.estimate(build(EstimateConfig, {"model": {"preset": "gpt2-tiny"}, "data": {"seq_len": 128}}))
    said = "method.kind=low_rank, method.rank=64, train.precision=fp32, parallel.micro_batch_size=4"
    assert f"assumed, because they are not set: {said}; set what your run has." in capsys.readouterr().err
    assert result["estimate"]["assumed"] == said.split(", ")
