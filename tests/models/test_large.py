"""What large models need: weights that go where they are used, and no more of them in memory than that takes."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finhpc.errors import ConfigError
from finhpc.models.files.weights import Weights
from finhpc.models.loading import load_model
from tests.models.dense import saved, tiny_llama

THREADS = 4  # that transformers reads weights with


def test_a_model_for_another_device_is_never_whole_in_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny_llama(layers=8), tmp_path / "model")
    raw, alive, most = Weights.raw, set[int](), 0

    def watched(self: Weights, name: str) -> Tensor:
        nonlocal most
        tensor = raw(self, name)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Weights, "raw", watched)
    model = load_model(folder, torch.bfloat16, "meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert len(list(model.parameters())) > 60
    assert 0 < most <= 2 * THREADS


def test_a_model_that_a_gpu_has_no_room_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny_llama(), tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.raises(ConfigError, match=r"in bfloat16, and the GPU has .* GB free .*use fewer bits"):
        load_model(folder, torch.bfloat16, "cuda")
