"""Sizes and speeds of models and adapters at several bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open

from finhpc.commands.export import export
from finhpc.commands.reproduce.measure import measure_widths, own_bits
from finhpc.models.lora.peft_format import QUANTIZED
from finhpc.settings.export import ExportConfig, ExportQuantization
from finhpc.settings.reproduce import MeasureConfig
from finhpc.settings.training import Resources
from tests.generation.folders import tiny_adapter, tiny_folder, tiny_model


def test_a_low_rank_model_and_an_adapter_are_measured_at_their_bits(tmp_path: Path) -> None:
    low = str(tiny_folder(tmp_path / "low", "gpt2", "low_rank"))
    base = tiny_folder(tmp_path / "base", "llama")
    adapter = tiny_adapter(tmp_path / "adapter", tiny_model("llama"), ["model.layers.0.self_attn.q_proj"], 4, 1)
    about = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(base)}))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as a finetuning writes them
        shutil.copy(base / name, adapter / name)
    assert own_bits(str(adapter)) == own_bits(low) == 16
    (adapter / QUANTIZED).write_text(json.dumps({"bits": 8, "scheme": "int8"}))
    assert own_bits(str(adapter)) == 8
    settings = MeasureConfig(model=[low], bits=[8, 16], prompt=9, new=5, rounds=2, resources=Resources(device="cpu"))
    found = measure_widths(settings, tmp_path / "scratch", "cpu")
    found |= measure_widths(settings.model_copy(update={"model": [str(adapter)], "bits": []}), tmp_path / "s", "cpu")
    assert {model: list(widths) for model, widths in found.items()} == {low: [16, 8], str(adapter): [8]}
    for widths in found.values():
        for of in widths.values():
            assert 0 < of["generate_tokens_per_s"] < 1e5
    for model, form in ((low, "native"), (str(adapter), "merged")):
        out, eight = tmp_path / form, ExportQuantization(bits=8)
        told = export(ExportConfig(model=model, format=form, out=str(out), dtype="bfloat16", quantization=eight))  # type: ignore[arg-type]
        assert found[model][8]["size_bytes"] == told["size_bytes"]
        with safe_open(next(out.glob("*.safetensors")), framework="pt") as file:
            assert told["size_bytes"] > sum(file.get_tensor(name).nbytes for name in file.keys()) > 0  # noqa: SIM118
    assert 1.5 < found[low][16]["size_bytes"] / found[low][8]["size_bytes"] < 2.0
    assert not list((tmp_path / "scratch").iterdir()), "the exports are gone"
