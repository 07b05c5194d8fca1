"""The counts of a step on a pretended GPU, held exactly for models of a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from finhpc.bench.compiled_counts import GRAPHS
from finhpc.bench.counts import Counts, counting
from finhpc.bench.measures.step import COMPILED, OURS, bench_step, bench_step_finetune
from finhpc.bench.pretend_gpu import CUDA, pretended_gpu
from finhpc.bench.settings import FinetuneStepBench, StepBench
from finhpc.errors import ConfigError
from finhpc.settings.base import build

GPT2 = {"preset": "gpt2-tiny", "vocab_size": 211, "layers": 2, "width": 32, "heads": 4, "context": 32}
LOW_RANK: dict[str, Any] = {"kind": "low_rank", "rank": 8}
BF16 = {"precision": "bf16"}
# name -> settings, and launches, synchronizations and casts of a step
PRETRAINING: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "dense": ({"method": {"kind": "dense"}}, (105, 1, 3)),
    "dense bf16": ({"method": {"kind": "dense"}, "train": BF16}, (128, 1, 26)),
    "low_rank": ({"method": LOW_RANK}, (131, 1, 3)),
    "low_rank bf16": ({"method": LOW_RANK, "train": BF16}, (153, 1, 25)),
    "cola": ({"method": {"kind": "cola", "rank": 8}}, (147, 1, 3)),
    "blend": ({"method": {"kind": "blend", "rank": 8}}, (229, 1, 3)),
    "llama": ({"model": GPT2 | {"preset": "llama-tiny", "mlp_width": 48}, "method": LOW_RANK}, (316, 1, 3)),
    "micro-batches": ({"method": LOW_RANK, "parallel": {"micro_batches": 3}}, (419, 1, 3)),
}
FINETUNING = {16: (643, 1, 50), 8: (886, 29, 103), 4: (696, 1, 50)}  # bits of the base -> the same


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


def finetuning(tmp_path: Path, bits: int, compile_: str = "off") -> dict[str, Any]:
    tree = {
        "model": {"preset": "llama-tiny"},
        "lora": {"rank": 4},
        "train": BF16 | {"compile": compile_},
        "parallel": {"micro_batch_size": 4},
        "quantization": {"bits": bits},
        "bench": {"out": str(tmp_path), "tokens": 32, "shared": 9, "answer": 2},
    }
    return bench_step_finetune(build(FinetuneStepBench, tree))


@pytest.mark.parametrize("bits", FINETUNING)
def test_finetuning(tmp_path: Path, bits: int) -> None:
    result = finetuning(tmp_path, bits)
    assert triple(result) == FINETUNING[bits], result["operations"][OURS]
    assert result["ratios"]["kept_over_plain"] < 0.5


def test_a_compiled_finetuning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All products of blocks are in graphs; what a graph has besides is fused."""
    result = finetuning(tmp_path, 16, "on")
    compiled = result["rows"][2]
    assert compiled["way"] == COMPILED
    operations = result["operations"][COMPILED]
    assert compiled["launches"] == sum(operations.values())
    assert compiled["synchronizations"] == 1
    assert compiled["launches"] < 0.65 * result["rows"][0]["launches"]
    products = sum(result["operations"][OURS][name] for name in ("mm", "addmm", "addmm_"))
    assert products < operations[GRAPHS] < 1.6 * products
    assert not {"mm", "addmm", "addmm_", "silu"} & operations.keys()
    assert result["ratios"]["compiled_launches_over_plain"] == compiled["launches"] / result["rows"][1]["launches"]
    attention = "_scaled_dot_product_efficient_attention"
    assert operations[attention] == result["operations"][OURS][attention]
    caplog.clear()
    with caplog.at_level("INFO", "finhpc"):
        assert len(finetuning(tmp_path, 4, "auto")["rows"]) == 2
    assert "compiled steps are not counted: a base below 16 bits" in caplog.text


def test_counts_of_known_operations() -> None:
    def work() -> None:
        weight = torch.ones(4, 8, device=CUDA, requires_grad=True)  # 1
        x = torch.ones(3, 8).to(CUDA)  # waits
        y = F.linear(x, weight).view(-1).half()  # 2, and a cast
        assert y.device.type == "cuda"
        assert y.is_cuda
        y.sum().backward()  # 1; a fill, a cast, a product
        if bool((torch.arange(5, device=CUDA) > 3).any()):  # 3, and waits: the content is known
            torch.empty(7, device=CUDA).zero_()  # 1
        torch.ones(2, pin_memory=True).to(CUDA, non_blocking=True)

    counts = counted(work)
    assert counts.launches.total() == 11, counts.operations
    assert (counts.casts, counts.copies, counts.waits.total()) == (2, 2, 2), counts.waits
    assert counts.kept.total() == 3 * 8 * 4
    assert counts.operations["mm"] == 2
    assert counts.moved["zero fills"] == 7 * 4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_one_kernel_each_way(masked: bool, dtype: torch.dtype) -> None:
    def work() -> None:
        q, k, v = (torch.ones(2, 4, 16, 8, device=CUDA, dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.ones(16, 16, dtype=dtype, device=CUDA) if masked else None
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked)
        assert out.shape == q.shape
        assert out.dtype == dtype
        out.backward(torch.ones_like(out))

    attention = [name for name in counted(work).operations if "attention" in name]
    kernel = "flash" if dtype == torch.bfloat16 and not masked else "efficient"
    assert attention == [f"_scaled_dot_product_{kernel}_attention", f"_scaled_dot_product_{kernel}_attention_backward"]


def like(x: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=x.dtype, device=x.device)


AUTOCAST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": torch.matmul,
    "__matmul__": lambda x, w: x @ w,
    "mm": torch.mm,
    "addmm": lambda x, w: torch.addmm(w, x, w),
    "bmm": lambda x, w: torch.bmm(like(x, 1, 8, 8), like(w, 1, 8, 8)),
    "baddbmm": lambda x, w: torch.baddbmm(like(w, 1, 8, 8), like(x, 1, 8, 8), like(w, 1, 8, 8)),
    "layer_norm": lambda x, w: F.layer_norm(x, (8,), like(w, 8)),
    "softmax": lambda x, w: F.softmax(x, -1),
    "log_softmax": lambda x, w: torch.log_softmax(x, -1),
    "cross_entropy": lambda x, w: F.cross_entropy(x, torch.zeros(8, dtype=torch.int64, device=x.device)),
    "pow": lambda x, w: x.pow(2),
    "__pow__": lambda x, w: x**2,
    "exp": lambda x, w: torch.exp(x),
    "rsqrt": lambda x, w: torch.rsqrt(x),
    "sum": lambda x, w: x.sum(),
    "cumsum": lambda x, w: x.cumsum(0),
    "prod": lambda x, w: x.prod(),
    "gelu": lambda x, w: F.gelu(x),
    "silu": lambda x, w: F.silu(x),
    "mul": torch.mul,
    "add": torch.add,
    "tanh": lambda x, w: torch.tanh(x),
    "mean": lambda x, w: x.mean(),
    "attention": lambda x, w: F.scaled_dot_product_attention(like(x, 1, 1, 8, 8), *2 * [like(w, 1, 1, 8, 8)]),
}


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_cuda(name: str, dtype: torch.dtype) -> None:
    def result(device: torch.device) -> torch.dtype:
        x, w = torch.ones(8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
        with torch.autocast("cuda", torch.bfloat16):
            return AUTOCAST[name](x, w).dtype

    with pretended_gpu():
        found = result(CUDA)
    # A build for CPUs has torch's own autocast for CUDA in forward passes of fake tensors.
    bf16, amp = patch.object(torch.cuda, "is_bf16_supported", lambda: True), torch.cuda.amp.common
    with bf16, patch.object(amp, "amp_definitely_not_available", lambda: False), FakeTensorMode(), torch.no_grad():
        assert found == result(CUDA)


def test_examples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"bench\.shared=40 and bench\.answer=2 do not fit into the shortest example"):
        bench_step_finetune(build(FinetuneStepBench, {"bench": {"shared": 40}}))
