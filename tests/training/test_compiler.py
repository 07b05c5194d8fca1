"""Compiled steps against eager ones: the same numbers, few graphs, and what happens without a compiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from finhpc.errors import ConfigError, FinhpcError
from finhpc.models.families.parts import as_it_is
from finhpc.models.files.source import open_weights
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
from finhpc.models.packing.layout import LAYOUT
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneQuantization, Lora
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training import compiler
from finhpc.training.compiler import Compiler, missing_compiler
from tests.models.dense import saved, tiny_llama
from tests.models.packs import examples, packs_of
from tests.training.processes import run_processes
from tests.training.test_engine import hf_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := missing_compiler("cpu"):
        pytest.skip(f"torch.compile needs {missing}")
    torch._dynamo.reset()
    counters.clear()


Trained = tuple[list[float], dict[str, Tensor]]


def train(compile: str, steps: int = 4, **settings: Any) -> Trained:
    """Losses, and the weights at the end, of a tiny model with two micro-batches per step."""
    from finhpc.training.engine import Engine

    config = build(
        PretrainConfig,
        {
            "model": {"preset": settings.pop("preset", "gpt2-tiny"), "vocab_size": 300, "context": 64, "layers": 3},
            "method": {"kind": settings.pop("kind", "low_rank"), "rank": 8, "qkv": settings.pop("qkv", "joint")},
            "data": {"seq_len": 32},
            "parallel": {"micro_batch_size": 2, "micro_batches": 2},
            "train": {"steps": steps, "compile": compile, **settings},
        },
    )
    engine = Engine(config, hf_config(config), CPU)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        batches = iter([torch.randint(0, 300, (2, 32), generator=draw) for _ in range(2)])
        losses.append(engine.train_step(batches, 1e-3))
    return losses, {name: p.detach().clone() for name, p in engine.trained_parameters().items()}


def eager_and_compiled(settings: dict[str, Any]) -> tuple[Trained, int, Trained, int, dict[str, int]]:
    """What both give, with the number of graphs after each and the breaks of graphs, in a process of its own."""
    eager = train("off", **settings)
    before = counters["stats"]["unique_graphs"]
    compiled = train("on", **settings)
    return eager, before, compiled, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        ({}, 2),  # attention and MLP, for all blocks
        pytest.param({"kind": "blend"}, 4, marks=pytest.mark.slow),  # with W, and from the step on where alpha is 0
        pytest.param({"kind": "cola", "recompute": "full"}, 1, marks=pytest.mark.slow),
        pytest.param({"kind": "half", "qkv": "separate"}, 2, marks=pytest.mark.slow),
        pytest.param({"kind": "sltrain"}, 2, marks=pytest.mark.slow),
        pytest.param({"recompute": "attention", "kind": "dense"}, 2, marks=pytest.mark.slow),
        pytest.param({"preset": "llama-tiny"}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_has_the_same_numbers(settings: dict[str, Any], graphs: int) -> None:
    [(eager, before, both, after, breaks)] = run_processes(eager_and_compiled, 1, settings)
    (losses, weights), (ours, compiled) = eager, both
    assert (before, after, breaks) == (0, graphs, {})
    torch.testing.assert_close(ours, losses, rtol=1e-5, atol=0)
    same = ours == losses and all(torch.equal(compiled[name], weight) for name, weight in weights.items())
    assert not same, "a compiled sum is rounded in another order, so this shows that it was compiled"
    for name, weight in weights.items():
        # Adam turns rounding errors of gradients near 0 into steps of the learning rate.
        assert (compiled[name] - weight).norm() < 5e-3 * weight.norm(), name


@pytest.mark.slow
def test_compiled_steps_are_the_same_at_every_start() -> None:
    first, again = (run_processes(train, 1, "on")[0] for _ in range(2))
    assert first[0] == again[0]
    assert all(torch.equal(weight, again[1][name]) for name, weight in first[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"bits": 4}, {"recompute": "full", "bits": 8}])
def test_packs_of_all_lengths_share_their_graphs(tmp_path: Path, how: dict[str, Any]) -> None:
    folder, bits = saved(tiny_llama(), tmp_path / "base"), how.pop("bits", 16)
    results = []
    for compiled in (as_it_is, Compiler("on", CPU, 0, dynamic=True)):
        lora = Lora(rank=4, init="orthogonal")
        lora_model = LoraModel(open_weights(folder, low_rank=True), lora, FinetuneQuantization(bits=bits), **how)
        layers = [LoraPipelineLayer(part, lora_model, CPU) for part in lora_model.parts(compiled)]
        parameters = {name: p for layer in layers for name, p in layer.parameters_by_name()}
        for count in (8, 5, 7):
            data: Any
            for data in packs_of(examples(count), 4, 6, padding=3):
                assert not hasattr(data, LAYOUT)
                for layer in layers:
                    data = layer(data)
                data.backward()
        results.append({name: p.grad for name, p in parameters.items()})
    assert dict(counters["graph_break"]) == {}
    # Queries, output and MLP; without a gradient of the input in the first block, and of one row in the last.
    assert counters["stats"]["unique_graphs"] <= 7
    for name, gradient in results[0].items():
        assert gradient is not None
        assert (results[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name  # type: ignore[operator]


def test_on_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"train.compile=on needs a C\+\+ compiler .*apt-get install g\+\+"):
        Compiler("on", CPU, 1e20)
    assert not Compiler("auto", CPU, 1e20).on


def test_auto_compiles_what_takes_long(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "finhpc")
    assert not Compiler("auto", CPU, 1e12).on
    assert "not compiled, because it repays runs of 600 s and more, and this one takes about 10 s" in caplog.text
    assert Compiler("auto", CPU, compiler.RATE["cpu"] * compiler.WORTHWHILE_S["cpu"]).on
    assert not Compiler("off", CPU, 1e20).on


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_a_failing_compiler(
    wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "finhpc")
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiled = Compiler(wanted, CPU, 1e20)

    def function(x: Tensor) -> Tensor:
        return x.sin() + 1

    run, x = compiled(function), torch.randn(3)
    with inductor_config.patch({"cpp.cxx": (str(broken),)}):
        if wanted == "on":
            with pytest.raises(FinhpcError, match=r"train\.compile=on: torch could not compile the model"):
                run(x)
            return
        assert torch.equal(run(x), function(x))
        assert torch.equal(run(x), function(x))
    assert caplog.text.count("could not compile") == 1
