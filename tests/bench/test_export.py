"""The bench of exported models, on a real one in real runtimes, each in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from finhpc.bench.measures.export import TIMES, bench_export
from finhpc.bench.settings import ExportBench
from finhpc.errors import ConfigError
from finhpc.settings.base import build
from tests.models.dense import saved, settled
from tests.models.runtimes import needs
from tests.tiny import TEXT, tiny_shards, with_tokenizer

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"vocab_size": 300, "num_hidden_layers": 2, "max_position_embeddings": 64, "eos_token_id": 0}
    made = settled(LlamaForCausalLM(LlamaConfig(**shape | WIDE, bos_token_id=0)))
    folder = saved(made, tmp_path_factory.mktemp("model") / "llama")
    return with_tokenizer(folder, tiny_shards(folder.with_name("shards"), blocks=8))


def settings(model: Path | None, tmp_path: Path, **more: Any) -> ExportBench:
    text = tmp_path / "text.txt"
    text.write_text(f"{TEXT} caf\u00e9 \U0001f600 " * 3)
    tree: dict[str, Any] = {
        "model": model and str(model), "text": str(text), "prompt": 12, "new": 6, "windows": 2, "seq_len": 24,
        "bench": {"repeats": 1, "out": str(tmp_path / "bench")}, "resources": {"threads": 1, "device": "cpu"},
    }  # fmt: skip
    return build(ExportBench, tree | more)


def test_exports_are_measured_in_their_runtimes(model: Path, tmp_path: Path) -> None:
    needs("xllamacpp")
    needs("onnxruntime_genai")
    result = bench_export(settings(model, tmp_path, bits=[8]))
    rows = {(row["format"], row["bits"]): row for row in result["rows"]}
    assert [*rows] == [("finhpc native", 16), ("finhpc native", 8), ("onnx", 8), ("gguf", 8)]
    for form, scheme in (("onnx", "MatMulNBits"), ("gguf", "Q8_0")):
        row = rows[form, 8]
        assert row["scheme"] == scheme
        assert all(row[key] > 0 for key in TIMES)
        # Each has Python in memory, not torch, and nothing of the process that started it.
        assert row["file_bytes"] + 1e7 < row["peak_rss_bytes"] < 4e8
        assert row["perplexity"] == pytest.approx(rows["finhpc native", 16]["perplexity"], rel=0.01)
        assert row["perplexity_over_finhpc"] == result["ratios"][f"perplexity_{form}_8_over_finhpc"]
    assert result["ratios"]["perplexity_finhpc_8_over_16_bits"] == rows["finhpc native", 8]["perplexity_over_16_bits"]
    assert len(result["ratios"]) == 5


def test_bad_input_is_named_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bench export needs --model"):
        bench_export(settings(None, tmp_path))
    with pytest.raises(ConfigError, match=r"has \d+ tokens, and 4,096 are needed"):
        bench_export(settings(model, tmp_path, windows=64, seq_len=64))
    with pytest.raises(ConfigError, match="at most the context of 64"):
        bench_export(settings(model, tmp_path, seq_len=65))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ConfigError, match=r"formats=gguf needs xllamacpp in .*; run pip install xllamacpp there"):
        bench_export(settings(model, tmp_path, formats=["gguf"], python=str(bare)))
    assert not (tmp_path / "bench").exists()
