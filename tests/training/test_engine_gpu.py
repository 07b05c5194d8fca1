"""The engine on a GPU against the engine on the CPU, which equals a plain torch loop (`test_engine`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu import CUDA, ON, alone, held_bytes, needs_gpu, peak_of
from tests.training.processes import run_processes
from tests.training.test_engine import assert_same, engine_runs, hf_config, settings

pytestmark = needs_gpu

STEPS = 6
GPT2, TIED, LLAMA = "gpt2-untied-low-rank", "gpt2-tied-dense", "llama-low-rank-embedding"
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (TIED, {}),
    "low-rank": (GPT2, {}),
    "low-rank llama": (LLAMA, {}),
    "cola": (LLAMA, {"method": {"kind": "cola"}}),
    "sltrain": (LLAMA, {"method": {"kind": "sltrain"}}),
    "blend": (GPT2, {"method": {"kind": "blend", "blend_share": 0.5, "blend_weight": "trainable"}}),
    "spectron": (GPT2, {"optimizer": {"name": "spectron", "lr": 0.05}}),
    "apollo": (TIED, {"optimizer": {"name": "apollo_mini"}}),
    "product decay": (LLAMA, {"optimizer": {"decay": "product", "weight_decay": 5.0}}),
}
NEAR: dict[str, tuple[str, dict[str, Any]]] = {  # what rounds: in the last bit of a sum another value is chosen
    "bf16, dense": (TIED, {"precision": "bf16"}),
    "bf16, low-rank llama": (LLAMA, {"precision": "bf16"}),
    "8 bits": (GPT2, {"bits": 8}),
    "4 bits, tied": (TIED, {"bits": 4}),
    "muon": (TIED, {"optimizer": {"name": "muon"}}),
    "8-bit moments": (TIED, {"optimizer": {"name": "adamw8bit"}}),
}
MODES = [(case, mode) for case in (TIED, LLAMA) for mode in ("none", "attention", "full")]

Found = dict[str, dict[str, Any]]


def runs(cases: dict[str, tuple[str, dict[str, Any]]]) -> list[Any]:
    return [(case, 1, 1, 4, {"steps": STEPS, **train}) for case, train in cases.values()]


@pytest.fixture(scope="module")
def on_gpu() -> Found:
    with alone():
        return dict(zip(EXACT | NEAR, engine_runs(runs(EXACT | NEAR), STEPS, ON), strict=True))


@pytest.fixture(scope="module")
def on_cpu() -> Found:
    [found] = run_processes(engine_runs, 1, runs(EXACT | NEAR), STEPS)
    return dict(zip(EXACT | NEAR, found, strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_losses_gradients_and_weights_are_the_cpus(name: str, on_gpu: Found, on_cpu: Found) -> None:
    ours, plain = on_gpu[name], on_cpu[name]
    for key in ("losses", "norms", "eval"):
        assert ours[key] == pytest.approx(plain[key], rel=1e-4), key
    for key, tolerance in {"raw": 1e-4, "clipped": 1e-4, "weights": 1e-3}.items():
        assert_same(ours[key], plain[key], tolerance, key)


@pytest.mark.parametrize("name", NEAR)
def test_what_rounds_stays_close(name: str, on_gpu: Found, on_cpu: Found) -> None:
    ours, plain = on_gpu[name], on_cpu[name]
    bf16 = name.startswith("bf16")
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=5e-3 if bf16 else 1e-4)
    assert ours["losses"] == pytest.approx(plain["losses"], rel=5e-3)
    assert ours["norms"] == pytest.approx(plain["norms"], rel=5e-2)
    assert ours["eval"] == pytest.approx(plain["eval"], rel=5e-3)
    assert_same(ours["raw"], plain["raw"], 5e-2 if bf16 else 1e-3, "raw gradients")


def test_recomputing_gives_the_same_to_the_bit() -> None:
    with alone():
        found = engine_runs([(case, 1, 1, 4, {"recompute": mode}) for case, mode in MODES], 3, ON)
    for (case, mode), run in zip(MODES, found, strict=True):
        plain = found[MODES.index((case, "none"))]
        assert (run["losses"], run["norms"], run["eval"]) == (plain["losses"], plain["norms"], plain["eval"]), mode
        for key in ("raw", "weights"):
            assert all(torch.equal(value, plain[key][name]) for name, value in run[key].items()), (case, mode)


def peak(case: str, recompute: str) -> int:
    """Bytes that a second step of a wider model takes, beside what was there before it."""
    from finhpc.training.engine import Engine

    config = settings(case, 1, 1, 1, recompute=recompute)
    config.model.width, config.model.context, config.data.seq_len = 128, 512, 512
    config.model.mlp_width = 384
    before = held_bytes()
    engine = Engine(config, hf_config(config), torch.device(ON))
    batch = torch.randint(0, 211, (16, 512), generator=torch.Generator().manual_seed(0))
    engine.train_step(iter([batch]), 1e-3)
    return peak_of(lambda: engine.train_step(iter([batch]), 1e-3)) - before


@pytest.mark.parametrize("case", [TIED, LLAMA])
def test_recomputing_takes_less_memory(case: str) -> None:
    with alone():
        none, attention, full = (peak(case, mode) for mode in ("none", "attention", "full"))
    assert full < 0.7 * none
    assert full < attention <= none * (1.001 if CUDA else 1), "torch's fused kernels keep no probabilities anyway"
