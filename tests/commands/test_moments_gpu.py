"""Second moments of the layers' inputs, summed on a GPU: the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.commands.decompose.moments import second_moments
from finhpc.models.files.source import open_weights
from finhpc.models.lora.targets import linear_shape
from tests.gpu import DEVICE, needs_gpu
from tests.models.dense import saved, tiny_gpt2, tiny_llama

pytestmark = needs_gpu


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_moments_are_the_cpus(tmp_path: Path, make: Any) -> None:
    folder = saved(make(), tmp_path / "base")
    tokens = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(0))
    found: list[dict[str, torch.Tensor]] = []
    for device in (torch.device("cpu"), DEVICE):
        weights = open_weights(folder)
        linear = {name for name, module in weights.skeleton.named_modules() if linear_shape(module)} - {"lm_head"}
        parts = second_moments(weights, tokens, linear, device)
        found.append({name: moment for part in parts for name, moment in part.items()})
    plain, mine = found
    assert mine.keys() == plain.keys()
    for name, moment in plain.items():
        assert (mine[name] - moment).norm() <= 1e-5 * moment.norm(), name
