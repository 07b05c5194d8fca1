"""The generation bench on real models, of milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.bench.measures.generate import bench_generate
from finhpc.bench.settings import GenerateBench
from finhpc.errors import ConfigError
from finhpc.settings.base import build


def settings(tmp_path: Path, **more: Any) -> GenerateBench:
    tree: dict[str, Any] = {
        "models": ["gpt2-tiny:32"],
        "batches": [1, 2],
        "prompt": 10,
        "new": 10,
        "adapters": 2,
        "adapters_model": "llama-tiny",
        "requests": 9,
        "precision": "fp32",
        "bench": {"repeats": 1, "out": str(tmp_path)},
        "resources": {"device": "cpu", "threads": torch.get_num_threads()},
    }
    return build(GenerateBench, tree | more)


def test_every_way_is_measured_against_transformers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    capfd.readouterr()
    result = bench_generate(settings(tmp_path))
    table = [line for line in capfd.readouterr().err.splitlines() if line and line[0] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    assert not any("…" in line for line in table), "nothing is cut off"
    compared = {"cache_speedup", "mixed_adapters_over_single", "batched_over_one_at_a_time"}
    assert set(result["ratios"]) == {"gpt2_tiny_r32_over_dense", "over_hf_padded", "over_hf_continuous"} | compared
    assert [row["batch"] for row in result["rows"]] == [1] * 7 + [2] * 7
    dense, _, *low_rank = result["rows"][:7]
    assert dense["over_dense"] == 1
    sizes = {row["way"]: row["model_bytes"] for row in low_rank}
    assert list(sizes) == [f"rank 32, {form}" for form in ("16 bits", "8 bits", "int8", "4 bits", "nf4")]
    assert [row["bits"] for row in low_rank] == [16, 8, 8, 4, 4]
    assert sizes["rank 32, 16 bits"] > sizes["rank 32, 8 bits"] > sizes["rank 32, 4 bits"]
    for scheme, packed in (("int8", "8 bits"), ("nf4", "4 bits")):  # embeddings stay floats
        assert sizes["rank 32, 16 bits"] > sizes[f"rank 32, {scheme}"] > sizes[f"rank 32, {packed}"]
    assert [row["computed_tokens"] for row in result["cache_tokens"]] == [19, sum(range(10, 20))]
    assert (
        result["one_base"][0]["models_bytes"]
        > result["one_base"][0]["base_bytes"] + result["one_base"][0]["adapter_bytes"]
    )
    assert [(row["at_once"], row["requests"]) for row in result["batching"]] == [(1, 9), (8, 9), (9, 9)]
    assert result["batching"][0]["over_one_at_a_time"] == 1
    ways = {row["way"]: row for row in result["against_transformers"]}
    assert list(ways) == ["batched", "one at a time", "HF padded", "HF continuous"]
    assert {row["equal_ids"] for row in ways.values()} == {9}, "the same ids, whoever computes them"
    assert ways["batched"]["ours_over_it"] == 1
    assert ways["one at a time"]["cache_bytes"] < ways["batched"]["cache_bytes"]
    layouts = {(row["mix"], row["layout"]): row["used"] for row in result["cache_layouts"]}
    for mix in ("these", "ShareGPT", "Alpaca"):
        names = ("tokens", "paged", "rows: own end", "rows: longest", "rows: context")
        tokens, paged, own, longest, context = (layouts[mix, name] for name in names)
        assert tokens == 1 >= own > longest > context
        assert mix == "these" or paged > own, "of requests that go on, and are not shorter than a block"
    assert (Path(result["folder"]) / "cache-layouts.png").is_file()


def test_wrong_models_are_named(tmp_path: Path) -> None:
    for entry, message in {
        "gpt3:16": "is not a preset",
        "gpt2-tiny": "names no rank",
        "gpt2-tiny:0": "names no rank",
    }.items():
        with pytest.raises(ConfigError, match=message):
            bench_generate(settings(tmp_path, models=[entry]))
