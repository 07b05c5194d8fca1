"""A base quantised once on disk: the layers it gives, and what happens to it when files are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.errors import CheckpointError
from finhpc.models.families.registry import as_low_rank
from finhpc.models.files.source import open_weights
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
from finhpc.models.lora.quantized_cache import quantized_cache_bytes, write_quantized_cache
from finhpc.quantization.frozen import FrozenFloat, FrozenLinear
from finhpc.settings.finetune import FinetuneQuantization, Lora
from tests.models.dense import saved, tiny_gpt2, tiny_llama

WIDTHS = [(8, "int8"), (4, "nf4"), (8, "minmax"), (4, "minmax")]


def low_rank(folder: Path) -> Path:
    config = as_low_rank(tiny_gpt2().config, {"attention": 32, "mlp": 32}, qkv="separate")
    model = initial_model(config, 0, "normal")
    save_model(folder, config, ((k, v) for k, v in model.state_dict().items() if k != "lm_head.weight"), None)
    return folder


def adaptation_of(folder: Path, bits: Any, scheme: Any, kept: Path | None = None) -> LoraModel:
    return LoraModel(
        open_weights(folder, low_rank=True), Lora(rank=2), FinetuneQuantization(bits=bits, scheme=scheme), cache=kept
    )


def frozen_of(lora_model: LoraModel, device: str = "cpu") -> dict[str, FrozenLinear]:
    layers = [LoraPipelineLayer(part, lora_model, torch.device(device)) for part in lora_model.parts()]
    named = [(f"{i}.{name}", m) for i, layer in enumerate(layers) for name, m in layer.named_modules()]
    return {name: module for name, module in named if isinstance(module, FrozenLinear)}


@pytest.mark.parametrize(("bits", "scheme"), WIDTHS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "low_rank"])
def test_the_layers_are_those_of_the_base_quantised_anew(tmp_path: Path, kind: str, bits: int, scheme: str) -> None:
    folder = tmp_path / "base"
    if kind == "low_rank":
        low_rank(folder)
    else:
        saved(tiny_gpt2() if kind == "gpt2" else tiny_llama(), folder)
    told: list[int] = []
    write_quantized_cache(adaptation_of(folder, bits, scheme), tmp_path / "kept", told.append)
    plain = frozen_of(adaptation_of(folder, bits, scheme))
    lora_model = adaptation_of(folder, bits, scheme, tmp_path / "kept")
    quantised = {matrix.stored for matrix in lora_model.quantized_matrices()}
    assert len(told) == len(quantised) > 0

    read, taken = lora_model.weights.read, []
    lora_model.weights.read = lambda name: taken.append(name) or read(name)  # type: ignore[method-assign,func-returns-value]
    found = frozen_of(lora_model)
    assert taken
    assert not quantised & set(taken), "a quantised matrix is not read from the base again"
    assert found.keys() == plain.keys()
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    for name, layer in plain.items():
        assert torch.equal(found[name].matrix(torch.float32), layer.matrix(torch.float32)), name
        rows = x[:, : layer.in_features]
        assert torch.equal(found[name].train()(rows), layer.train()(rows)), name
    on_disk = sum(file.stat().st_size for file in (tmp_path / "kept").glob("*.safetensors"))
    assert 0 < quantized_cache_bytes(lora_model) < on_disk
    assert sum(not isinstance(layer, FrozenFloat) for layer in plain.values()) == len(quantised)


def test_a_damaged_one_is_made_again_and_a_lost_file_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, kept = saved(tiny_llama(), tmp_path / "base"), tmp_path / "kept"
    told: list[int] = []
    write_quantized_cache(adaptation_of(folder, 4, "minmax"), kept, told.append)
    once = len(told)
    write_quantized_cache(adaptation_of(folder, 4, "minmax"), kept, told.append)
    assert len(told) == once, "whole: not quantised again"
    file = sorted(kept.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    write_quantized_cache(adaptation_of(folder, 4, "minmax"), kept, told.append)
    assert len(told) == 2 * once
    assert file.read_bytes() == whole
    assert f"{file} is not as it was written" in capfd.readouterr().err
    file.unlink()
    with pytest.raises(CheckpointError, match=r"remove the folder"):
        frozen_of(adaptation_of(folder, 4, "minmax", kept))
