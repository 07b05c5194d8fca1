"""The size of a low-rank model and of its dense original: one rule for every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finhpc.commands.estimate.finetuning import estimate_finetune
from finhpc.commands.export import export
from finhpc.commands.finetune import Finetune
from finhpc.models.families.presets import Shape
from finhpc.models.families.registry import as_low_rank, make_config, model_sizes, parameter_count
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.settings.base import build
from finhpc.settings.estimate import FinetuneEstimateConfig
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import FinetuneConfig
from tests.models.dense import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2
from tests.tiny import with_tokenizer

RANKS: dict[str, dict[str, int | None]] = {
    "tied": {"attention": 6, "mlp": 6},
    "low-rank head": {"attention": 6, "mlp": 6, "head": 6},
    "low-rank embedding": {"attention": 6, "embedding": 6},
}
MAKES = [tiny_gpt2, tiny_llama, lambda: tiny_llama(tied=False), tiny_mistral, tiny_qwen2]


def by_hand(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make", MAKES, ids=["gpt2", "llama", "llama untied", "mistral", "qwen2"])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_decomposed_model_is_compared_with_the_model_it_came_from(make: Any, ranks: str, tmp_path: Path) -> None:
    dense = make()
    config = as_low_rank(dense.config, RANKS[ranks])
    sizes = model_sizes(config, config)
    assert sizes["params_dense"] == by_hand(dense) == model_sizes(config, dense.config)["params_dense"]
    assert sizes["params_total"] == parameter_count(config)
    again = type(config).from_dict(config.to_dict())  # as a folder keeps it
    assert model_sizes(again, again) == sizes


def test_export_and_finetune_report_it(tmp_path: Path) -> None:
    dense = tiny_llama(context=256)
    model = initial_model(as_low_rank(dense.config, RANKS["tied"]), 0, "spectral")
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    folder = tmp_path / "model"
    save_model(folder, model.config, state.items(), None)
    with_tokenizer(folder)
    for form in ("native", "merged"):
        result = export(ExportConfig(model=str(folder), out=str(tmp_path / form), format=form), dry_run=True)
        assert result["params_dense"] == by_hand(dense)
        assert result["params_total"] == (by_hand(dense) if form == "merged" else by_hand(model))
    (tmp_path / "news.txt").write_text("rates rise@positive\nprices fall@negative\nmarkets wait@neutral\n" * 8)
    data = {"source": [str(tmp_path / "news.txt")], "max_len": 200}
    tree = {"model": {"path": str(folder)}, "lora": {"rank": 2}, "data": data, "run": {"storage": str(tmp_path)}}
    counts = Finetune(build(FinetuneConfig, tree)).counts()
    assert counts["params_dense"] == by_hand(dense)
    assert counts["params_total"] == by_hand(model) + counts["params_trainable"]
    tree = {"model": {"path": str(folder)}, "lora": {"rank": 2}, "estimate": {"tokens": 128, "shared": 0}}
    planned = estimate_finetune(build(FinetuneEstimateConfig, tree))
    assert {key: planned[key] for key in ("params_dense", "params_total")} == {
        key: counts[key] for key in ("params_dense", "params_total")
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_from_scratch_is_compared_with_its_own_shape(tied: bool) -> None:
    for family in ("gpt2", "llama"):
        shape = Shape(family, 2, 32, 4, 64, 300, tied, mlp_width=48)
        dense = parameter_count(make_config(shape, dict.fromkeys(RANKS["tied"])))
        for ranks in RANKS.values():
            config = make_config(shape, ranks)
            assert model_sizes(config, config)["params_dense"] == dense
