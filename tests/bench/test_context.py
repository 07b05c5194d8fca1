"""The bench of long inputs on real steps, with a model of milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.bench.measures.context import bench_context
from finhpc.bench.settings import ContextBench
from finhpc.errors import ConfigError
from finhpc.settings.base import build
from tests.models.dense import saved


def settings(folder: Path, **more: Any) -> ContextBench:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    saved(LlamaForCausalLM(config), folder / "base")
    tree: dict[str, Any] = {
        "model": str(folder / "base"),
        "lengths": [512, 128],
        "answer": 8,
        "rank": 4,
        "bench": {"repeats": 1, "out": str(folder / "bench")},
        "resources": {"device": "cpu", "threads": torch.get_num_threads()},
    }
    return build(ContextBench, tree | more)


def test_memory_grows_with_the_input_and_less_where_it_is_recomputed(tmp_path: Path) -> None:
    result = bench_context(settings(tmp_path))
    modes = ("none", "attention", "full")
    assert [(row["tokens"], row["recompute"]) for row in result["rows"]] == [(n, m) for n in (128, 512) for m in modes]
    rows = {(row["tokens"], row["recompute"]): row for row in result["rows"]}
    for row in result["rows"]:  # base, adapters and AdamW are the same in all; a pack is small beside them
        assert row["state_bytes"] == pytest.approx(rows[row["tokens"], "none"]["state_bytes"], rel=0.05)
    grown = {mode: rows[512, mode]["peak_memory_bytes"] - rows[512, mode]["state_bytes"] for mode in modes}
    less = {mode: rows[128, mode]["peak_memory_bytes"] - rows[128, mode]["state_bytes"] for mode in modes}
    for mode in modes:
        assert 2 < grown[mode] / less[mode] < 6, "intermediate variables go with the tokens"
    assert grown["full"] < 0.6 * grown["none"]
    assert grown["attention"] <= grown["none"]
    assert rows[128, "none"]["time_over_none"] == 1
    assert result["ratios"] == {
        f"{kind}_{mode}_over_none": rows[512, mode][f"{kind}_over_none"]
        for kind in ("time", "peak")
        for mode in modes[1:]
    }
    assert json.loads((Path(result["folder"]) / "result.json").read_text())["ratios"] == result["ratios"]


def test_inputs_outside_what_the_base_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lengths=513 is above the 512 tokens"):
        bench_context(settings(tmp_path, lengths=[513, 128]))
    with pytest.raises(ConfigError, match="lengths=8 leaves no input before answer=8"):
        bench_context(settings(tmp_path, lengths=[8, 128]))
