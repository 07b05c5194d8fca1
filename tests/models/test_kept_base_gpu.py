"""A base quantised once on the CPU gives a GPU the same layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finhpc.models.lora.quantized_cache import write_quantized_cache
from tests.gpu import ON, needs_gpu
from tests.models.dense import saved, tiny_llama
from tests.models.test_kept_base import WIDTHS, adaptation_of, frozen_of

pytestmark = needs_gpu


@pytest.mark.parametrize(("bits", "scheme"), WIDTHS)
def test_kept_layers_are_the_cpus(tmp_path: Path, bits: int, scheme: str) -> None:
    folder, kept = saved(tiny_llama(), tmp_path / "base"), tmp_path / "kept"
    write_quantized_cache(adaptation_of(folder, bits, scheme), kept, lambda done: None)
    plain = frozen_of(adaptation_of(folder, bits, scheme))
    found = frozen_of(adaptation_of(folder, bits, scheme, kept), ON)
    assert found.keys() == plain.keys()
    for name, layer in plain.items():
        mine = found[name].matrix(torch.float32)
        assert mine.device.type == ON
        torch.testing.assert_close(mine.cpu(), layer.matrix(torch.float32), rtol=1e-6, atol=1e-7)
