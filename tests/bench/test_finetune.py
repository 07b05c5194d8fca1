"""The finetuning bench on real passes, with a model of milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finhpc.bench.measures.finetune import OURS, PLAIN, TRAINER, bench_finetune
from finhpc.bench.settings import FinetuneBench
from finhpc.errors import ConfigError
from finhpc.settings.base import build
from tests.models.dense import saved
from tests.tiny import WORDS, tiny_shards


def settings(folder: Path, **more: Any) -> FinetuneBench:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(tiny_shards(folder / "shards") / "tokenizer").save_pretrained(folder / "base")
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    saved(LlamaForCausalLM(config), folder / "base")
    labels = ("positive", "negative", "neutral")
    lines = [f"{' '.join(WORDS[i % 5 : i % 5 + 3 + i % 7])} {i}@{labels[i % 3]}" for i in range(40)]
    (folder / "sentences.txt").write_text("\n".join(lines) + "\n")
    tree: dict[str, Any] = {
        "model": str(folder / "base"),
        "source": str(folder / "sentences.txt"),
        "examples": 24,
        "batch": 8,
        "rank": 4,
        "compiled": False,
        "bench": {"repeats": 1, "out": str(folder / "bench")},
        "resources": {"device": "cpu", "threads": 1},
    }
    return build(FinetuneBench, tree | more)


def test_all_ways_learn_the_same_from_the_same_examples(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    result = bench_finetune(settings(tmp_path))
    table = [line for line in capfd.readouterr().err.splitlines() if line and line[0] in "┏┃┡│└"]
    assert len(table) > 8
    assert max(map(len, table)) <= 80
    assert sum("HF Trainer" in line for line in table) == 2, "no name is folded"
    assert all(line[-1] in "┓┃┩│┘" for line in table), "nothing is cut off"
    assert not any("…" in line for line in table)
    assert [(row["base"], row["way"]) for row in result["rows"]] == [
        (base, way) for base in ("bf16", "nf4") for way in (PLAIN, TRAINER, OURS)
    ]
    for base in ("bf16", "nf4"):
        rows = {row["way"]: row for row in result["rows"] if row["base"] == base}
        for key in ("loss_first", "loss_last"):
            assert rows[OURS][key] == pytest.approx(rows[PLAIN][key], rel=5e-3)
            assert rows[TRAINER][key] == pytest.approx(rows[PLAIN][key], rel=5e-3)
        assert rows[PLAIN]["loss_last"] < rows[PLAIN]["loss_first"] - 0.01
        peak = result["ratios"][f"peak_memory_over_peft_{base}"]
        assert peak == rows[OURS]["peak_memory_bytes"] / rows[PLAIN]["peak_memory_bytes"]
        assert 0 < peak < 1
        assert result["ratios"][f"examples_per_s_over_peft_{base}"] > 0
    assert result["ratios"]["peak_memory_over_peft"] == result["ratios"]["peak_memory_over_peft_bf16"]
    assert json.loads((Path(result["folder"]) / "result.json").read_text())["ratios"] == result["ratios"]


def test_both_sides_train_dora(tmp_path: Path) -> None:
    result = bench_finetune(settings(tmp_path, dora=True, bits=[16]))
    losses = {row["way"]: row["loss_last"] for row in result["rows"]}
    assert losses[OURS] == pytest.approx(losses[PLAIN], rel=5e-3)
    assert result["conditions"]["adapters"].startswith("DoRA, rank 4")


@pytest.mark.slow
def test_compiled_ways_learn_the_same(tmp_path: Path) -> None:
    result = bench_finetune(settings(tmp_path, compiled=True, bits=[16]))
    losses = {row["way"]: row["loss_last"] for row in result["rows"]}
    assert len(losses) == 5
    for way in (OURS, PLAIN):
        assert losses[f"{way}, compiled"] == pytest.approx(losses[way], rel=5e-3)


def test_too_few_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="examples=8 gives 8 examples, less than two batches"):
        bench_finetune(settings(tmp_path, examples=8))
