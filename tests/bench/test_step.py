"""The counts of a step on a pretended GPU, held exactly for models of a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finhpc.bench.counts import Counts, counting
from finhpc.bench.measures.step import OURS, bench_step, bench_step_finetune
from finhpc.bench.pretend_gpu import pretended_gpu
from finhpc.bench.settings import FinetuneStepBench, StepBench
from finhpc.settings.base import build

GPT2 = {"preset": "gpt2-tiny", "vocab_size": 211, "layers": 2, "width": 32, "heads": 4, "context": 32}
LOW_RANK: dict[str, Any] = {"kind": "low_rank", "rank": 8}
BF16 = {"precision": "bf16"}
# name -> settings, and launches, synchronizations and casts of a step
PRETRAINING: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "dense": ({"method": {"kind": "dense"}}, (0, 0, 0)),
    "dense bf16": ({"method": {"kind": "dense"}, "train": BF16}, (0, 0, 0)),
    "low_rank": ({"method": LOW_RANK}, (0, 0, 0)),
    "low_rank bf16": ({"method": LOW_RANK, "train": BF16}, (0, 0, 0)),
    "cola": ({"method": {"kind": "cola", "rank": 8}}, (0, 0, 0)),
    "blend": ({"method": {"kind": "blend", "rank": 8}}, (0, 0, 0)),
    "llama": ({"model": GPT2 | {"preset": "llama-tiny", "mlp_width": 48}, "method": LOW_RANK}, (0, 0, 0)),
    "micro-batches": ({"method": LOW_RANK, "parallel": {"micro_batches": 3}}, (0, 0, 0)),
}
FINETUNING = {16: (0, 0, 0), 8: (0, 0, 0), 4: (0, 0, 0)}  # bits of the base -> the same


def counted(work: Callable[[], object]) -> Counts:
    with pretended_gpu(), counting() as mode:
        return mode.count(work, [])


def triple(result: dict[str, Any]) -> tuple[int, int, int]:
    ours = result["rows"][0]
    assert ours["way"] == OURS
    return ours["launches"], ours["synchronizations"], ours["casts"]


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining(tmp_path: Path, name: str) -> None:
    tree, wanted = PRETRAINING[name]
    result = bench_step(
        build(StepBench, {"model": GPT2, "data": {"seq_len": 32}, "bench": {"out": str(tmp_path)}} | tree)
    )
    assert triple(result) == wanted, result["operations"][OURS]
    assert result == json.loads((Path(result["folder"]) / "result.json").read_text())


@pytest.mark.parametrize("bits", FINETUNING)
def test_finetuning(tmp_path: Path, bits: int) -> None:
    tree = {
        "model": {"preset": "llama-tiny"},
        "lora": {"rank": 4},
        "train": BF16,
        "parallel": {"micro_batch_size": 4},
        "quantization": {"bits": bits},
        "bench": {"out": str(tmp_path), "tokens": 32, "shared": 9, "answer": 2},
    }
    result = bench_step_finetune(build(FinetuneStepBench, tree))
    assert triple(result) == FINETUNING[bits], result["operations"][OURS]
    assert result["ratios"]["kept_over_plain"] < 0.5
