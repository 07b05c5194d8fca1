"""What large models need: weights that go where they are used, and no more of them in memory than that takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finhpc.errors import ConfigError
from finhpc.models.files.weights import Weights
from finhpc.models.loading import load_model
from tests.models.dense import saved, tiny_llama
from tests.models.seven_billion import BLOCK, LARGEST, sparse_llama
from tests.tiny import with_tokenizer

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


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    with_tokenizer(saved(tiny_llama(tied=False, context=256), folder / "tiny"))
    return sparse_llama(folder / "model")


def needed(work: str, folder: Path) -> dict[str, int]:
    """The memory of a process of its own that does that work, see `tests.models.seven_billion`."""
    command = [sys.executable, "-m", "tests.models.seven_billion", work, str(folder)]
    own = os.environ | {"XDG_CACHE_HOME": str(folder.parent)}  # where hashes are remembered
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    print(work, {name: f"{number / 1e6:,.0f} MB" for name, number in figures.items()})
    return figures


@pytest.mark.slow
def test_the_driver_of_a_7b_finetuning_takes_little_memory(seven_billion: Path) -> None:
    driver = needed("plan", seven_billion)
    assert driver["process_bytes"] < 2e9
    assert driver["peak_bytes"] < 0.2e9, "of which the model is no part"


@pytest.mark.slow
def test_a_7b_worker_takes_its_stage_and_a_layer_at_4_bits(seven_billion: Path) -> None:
    worker = needed("quantize", seven_billion)
    assert 0.5 < worker["kept_bytes"] / (2 * BLOCK) < 0.8, "bytes per parameter, with scales and adapters"
    assert worker["peak_bytes"] < worker["kept_bytes"] + 4 * BLOCK, "bitsandbytes takes 4 copies of a matrix on a CPU"


@pytest.mark.slow
def test_a_7b_worker_takes_its_stage_and_a_layer_in_float32(seven_billion: Path) -> None:
    worker = needed("start", seven_billion)
    assert worker["kept_bytes"] == pytest.approx(4 * 2 * BLOCK, rel=0.001)
    assert worker["peak_bytes"] < worker["kept_bytes"] + 2 * 4 * LARGEST, "matrices"


@pytest.mark.slow
def test_the_driver_saves_a_7b_model_with_little_memory(seven_billion: Path) -> None:
    driver = needed("save", seven_billion)
    assert driver["process_bytes"] < 2e9
    assert driver["peak_bytes"] > 0.5e9, "about a gigabyte at a time"


@pytest.mark.slow
def test_a_7b_worker_resumes_with_its_stage_and_a_layer(seven_billion: Path) -> None:
    worker = needed("resume", seven_billion)
    assert worker["kept_bytes"] == pytest.approx(3 * 4 * BLOCK, rel=0.001), "weights and two moments"
    assert worker["peak_bytes"] < worker["kept_bytes"] + 2 * 4 * LARGEST, "matrices"
