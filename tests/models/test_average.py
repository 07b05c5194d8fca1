"""Averaged adapters and adapters of a lower rank are compared with peft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finhpc.commands.export import export
from finhpc.errors import ConfigError
from finhpc.models.families.registry import skeleton
from finhpc.models.files.source import config_of
from finhpc.models.loading import load_model
from finhpc.models.lora.adapter_file import load_adapter
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.models.folders import adapter_ways, assert_all_give, logits, peft_adapter
from tests.models.test_adapter_kinds import changed
from tests.tiny import with_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(saved(tiny_gpt2(layers=2), tmp_path_factory.mktemp("gpt2") / "base"))


def exported(model: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return export(build(ExportConfig, {"model": str(model), "out": str(out)} | settings))


def three(base: Path, folder: Path) -> list[Path]:
    """Adapters of different layers, ranks and scales."""
    kinds: list[dict[str, Any]] = [
        {"target_modules": ["c_attn", "c_fc"], "r": 4, "lora_alpha": 8},
        {"target_modules": ["c_attn"], "r": 2, "lora_alpha": 3, "use_rslora": True},
        {"target_modules": ["c_attn", "mlp.c_proj"], "r": 3},
    ]
    return [peft_adapter(base, folder / f"adapter{i}", **kind) for i, kind in enumerate(kinds)]


def test_the_mean_is_what_peft_gives(base: Path, tmp_path: Path) -> None:
    folders = three(base, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folders[0]), adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(i))
    model.add_weighted_adapter(["0", "1", "2"], [1 / 3] * 3, "mean", combination_type="cat")
    model.set_adapter("mean")
    wanted = logits(model.eval())
    others = [str(folder) for folder in folders[1:]]
    result = exported(folders[0], tmp_path / "mean", format="adapter", average=others)
    assert result["status"] == "finished"
    assert result["params_total"] < result["params_dense"]
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "mean")).eval()
    assert torch.allclose(logits(opened), wanted, atol=1e-5)
    ways = adapter_ways(base, tmp_path / "mean", tmp_path / "out")
    assert_all_give(ways, wanted)
    exported(folders[0], tmp_path / "merged", format="merged", average=others)
    assert torch.allclose(logits(load_model(tmp_path / "merged")), wanted, atol=1e-5)
    exact = load_adapter(tmp_path / "mean", skeleton(config_of(base)))
    assert {len(a) for a, _ in exact.pairs.values()} == {4 + 2 + 3}


def test_a_lower_rank_is_the_closest_one(base: Path, tmp_path: Path) -> None:
    folders = three(base, tmp_path)
    exported(folders[0], tmp_path / "low", format="adapter", average=[str(folders[2])], rank=3)
    exported(folders[0], tmp_path / "all", format="adapter", average=[str(folders[2])])
    low, whole = (load_adapter(tmp_path / name, skeleton(config_of(base))) for name in ("low", "all"))
    for name, (a, b) in low.pairs.items():
        assert len(a) == 3
        exact = whole.scales[name] * whole.pairs[name][1] @ whole.pairs[name][0]
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        torch.testing.assert_close(low.scales[name] * b @ a, u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-5)


def test_what_has_no_mean_is_refused_together(base: Path, tmp_path: Path) -> None:
    first, second, third = three(base, tmp_path)
    dora = peft_adapter(base, tmp_path / "dora", target_modules=["c_attn"], use_dora=True)
    (third / "base_quantization.json").write_text('{"bits": 4, "scheme": "nf4"}')
    with pytest.raises(ConfigError) as caught:
        exported(first, tmp_path / "out", format="merged", average=[str(dora), str(third)])
    assert f"average: {dora} has use_dora=true" in str(caught.value)
    assert f"average: {third} was trained on a base of 4 bits nf4" in str(caught.value)
    other = saved(tiny_llama(layers=2), tmp_path / "other")
    foreign = peft_adapter(other, tmp_path / "foreign", target_modules=["q_proj"])
    changed(foreign, {"base_model_name_or_path": str(base)})
    for settings, said in (
        ({"average": [str(first)]}, "is given twice"),
        ({"average": [str(foreign)]}, "which the base does not have"),
        ({}, "format=adapter would copy the adapter"),
        ({"average": [str(second)], "quantization": {"bits": 8}}, "format=adapter writes float32"),
        ({"average": [str(second)], "rank": 2, "format": "merged"}, "rank=2 is of an exported adapter"),
    ):
        with pytest.raises(ConfigError, match=said):
            exported(first, tmp_path / "out", **{"format": "adapter"} | settings)
    with pytest.raises(ConfigError, match="rank=2 does not fit an adapter with use_dora=true"):
        exported(dora, tmp_path / "out", format="adapter", rank=2)
    with pytest.raises(ConfigError, match="is no adapter, which average, rank and format=adapter need"):
        exported(base, tmp_path / "out", average=[str(first)])
    assert not (tmp_path / "out").exists()
