"""The memory that is predicted for a finetuning is the memory that an engine's processes take, counted."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from finhpc.config import build
from finhpc.config.finetune import FinetuneConfig
from finhpc.models.adapted import Adaptation
from finhpc.models.packed import segments_of
from finhpc.models.weights import open_weights
from finhpc.planning.adapted import PackSize
from finhpc.planning.devices import DEVICES, Cluster
from finhpc.planning.finetune import FinetunePlan
from finhpc.planning.memory import Topology
from finhpc.quantization.frozen import freeze, hollow
from tests.models.dense import saved
from tests.models.packs import examples, packs_of
from tests.training.processes import run_processes

LAYERS, EACH = 5, 8
CASES: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "int8": {"quantization": {"bits": 8}, "train": {"precision": "bf16"}},
    "nf4, two micro-batches": {"quantization": {"bits": 4}, "parallel": {"micro_batches": 2}},
    "minmax": {"quantization": {"bits": 4, "scheme": "minmax"}, "train": {"precision": "bf16"}},
    "attention recomputed, q and v": {"train": {"recompute": "attention"}, "lora": {"targets": ["q_proj", "v_proj"]}},
    "blocks recomputed": {"train": {"recompute": "full"}},
    "gpt2": {"family": "gpt2", "train": {"precision": "bf16"}},
    "two stages": {"parallel": {"stages": 2, "micro_batches": 3}},
    "two stages, tied, gpt2": {"family": "gpt2", "parallel": {"stages": 2, "micro_batches": 2}},
    "two replicas": {"parallel": {"replicas": 2}, "quantization": {"bits": 4}},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    gpt2 = GPT2Config(vocab_size=300, n_positions=128, n_embd=128, n_layer=LAYERS, n_head=4)
    return {
        "llama": saved(LlamaForCausalLM(llama), folder / "llama"),
        "gpt2": saved(GPT2LMHeadModel(gpt2), folder / "gpt2"),
    }


def settings(name: str, bases: dict[str, Path]) -> tuple[FinetuneConfig, Path]:
    case = dict(CASES[name])
    path = bases[case.pop("family", "llama")]
    return build(FinetuneConfig, {"model": {"path": str(path)}, "lora": {"rank": 4}, **case}), path


def packs(config: FinetuneConfig) -> list[torch.Tensor]:
    parallel = config.parallel
    count = parallel.micro_batches * parallel.replicas
    return packs_of(examples(EACH, prefix=8, longest=40), EACH, 8) * count


def counted(names: list[str], bases: dict[str, Path]) -> list[tuple[int, int]]:
    """(stage, counted peak of a second step) of this process, for each case."""
    from finhpc.training.engine import Engine
    from finhpc.training.memory import counted_peak, live_tensor_bytes

    found = []
    for name in names:
        gc.collect()
        left = live_tensor_bytes()  # of the engine before, which DeepSpeed does not let go of
        config, path = settings(name, bases)
        adaptation = Adaptation.of(config, open_weights(path))
        engine = Engine(config, adaptation.hf_config, torch.device("cpu"), adapt=adaptation)
        mine = packs(config)[: config.parallel.micro_batches]
        engine.train_step(iter(mine), 1e-3)
        _, peak = counted_peak(lambda engine=engine, mine=mine: engine.train_step(iter(mine), 1e-3))
        found.append((engine.stage, peak - left))
    return found


def planned(name: str, bases: dict[str, Path]) -> FinetunePlan:
    config, path = settings(name, bases)
    parallel = config.parallel
    one = packs(config)[0]
    size = PackSize(one.shape[2], segments_of(one[0]))
    topology = Topology(parallel.stages, parallel.replicas, EACH, parallel.micro_batches)
    return FinetunePlan(Adaptation.of(config, open_weights(path)), size, topology, layouts=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_predicted_peak_is_the_counted_one(workers: int, bases: dict[str, Path]) -> None:
    names = [name for name in CASES if settings(name, bases)[0].parallel.workers == workers]
    seen = []
    for worker in run_processes(counted, workers, names, bases):
        for name, (stage, peak) in zip(names, worker, strict=True):
            seen.append((name, stage, peak, planned(name, bases).stages()[stage].peak_bytes))
    print("\n".join(f"{n} {s} {p:,} {q:,} {q / p:.4f}" for n, s, p, q in seen))
    for name, stage, peak, predicted in seen:
        assert predicted == pytest.approx(peak, rel=0.02), (name, stage)
