"""The memory that is predicted for a GPU is what torch.cuda counts of an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finhpc.planning.memory import Memory, Scheme, Topology
from finhpc.planning.outline import outline_of
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from tests.gpu import CUDA, DEVICE, alone, held_bytes, needs_gpu, peak_of
from tests.planning.test_memory import SHAPE, hf_config

pytestmark = needs_gpu

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2-127m"},
    "llama": {
        "preset": "llama2-7b",
        "layers": 12,
        "width": 768,
        "heads": 12,
        "mlp_width": 2048,
        "context": 1024,
    },
}
METHODS: dict[str, dict[str, Any]] = {"dense": {"kind": "dense"}, "low-rank": {"kind": "low_rank", "rank": 64}}


def settings(model: str, method: str, recompute: str, size: int) -> PretrainConfig:
    small = {} if CUDA else SHAPE | ({"mlp_width": 352} if model == "llama" else {})
    tree = {
        "model": MODELS[model] | small,
        "method": METHODS[method],
        "data": {"seq_len": 1024 if CUDA else 128},
        "parallel": {"micro_batch_size": size, "micro_batches": 2},
        "train": {"precision": "bf16", "recompute": recompute},
    }
    return build(PretrainConfig, tree)


def predicted(config: PretrainConfig) -> int:
    parallel, seq_len = config.parallel, config.data.seq_len
    scheme = Scheme(precision="bf16", cuda=CUDA)
    outline = outline_of(hf_config(config), seq_len, config.train.recompute, scheme.fused(seq_len))
    [stage] = Memory(outline, scheme).stages(Topology(1, 1, parallel.micro_batch_size, parallel.micro_batches))
    return stage.peak_bytes


def measured(config: PretrainConfig) -> int:
    """Of a second step; what libraries hold, and an engine before, was there already."""
    from finhpc.training.engine import Engine

    before = held_bytes()
    engine = Engine(config, hf_config(config), DEVICE)
    vocab, shape = engine.hf_config.vocab_size, (config.parallel.micro_batch_size, config.data.seq_len)

    def step() -> None:
        draw = torch.Generator().manual_seed(0)
        batches = (torch.randint(0, vocab, shape, generator=draw) for _ in range(config.parallel.micro_batches))
        engine.train_step(batches, 1e-4)

    step()
    return peak_of(step) - before


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_predicted_peak_is_the_counted_one(model: str, method: str, recompute: str, size: int) -> None:
    config = settings(model, method, recompute, size)
    x = torch.ones(64, 64, device=DEVICE, dtype=torch.bfloat16)
    F.linear(x, x, x[0])  # cuBLAS takes its workspace with the first product
    with alone():
        peak, expected = measured(config), predicted(config)
    what = f"{model}, {method}, recompute {recompute}, {size} samples"
    print(f"{what}: {peak / 1e6:,.0f} MB, predicted over counted {expected / peak:.3f}")
    assert expected == pytest.approx(peak, rel=0.03)
