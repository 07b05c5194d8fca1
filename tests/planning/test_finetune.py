"""The memory that is predicted for a finetuning is the memory that an engine's processes take, counted."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from finhpc.data.examples.choices.candidates import Choice
from finhpc.data.examples.choices.packs import label_pack
from finhpc.models.families.registry import as_low_rank
from finhpc.models.files.source import open_weights
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.models.lora.model import LoraModel
from finhpc.models.packing.layout import segments_of
from finhpc.planning.devices import DEVICES, Cluster
from finhpc.planning.fake_packs import PackSize
from finhpc.planning.finetuning import LoraCosts
from finhpc.planning.memory import Topology
from finhpc.quantization.schemes import SCHEMES, freeze
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig
from tests.models.dense import saved
from tests.models.families import tiny
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
    "low-rank base": {"family": "low-rank", "quantization": {"bits": 8, "scheme": "minmax"}},
    "two stages": {"parallel": {"stages": 2, "micro_batches": 3}},
    "two stages, tied, gpt2": {"family": "gpt2", "parallel": {"stages": 2, "micro_batches": 2}},
    "two stages, muon": {"parallel": {"stages": 2, "micro_batches": 2}, "optimizer": {"name": "muon"}},
    "spectron": {"optimizer": {"name": "spectron"}},
    "8-bit moments": {"lora": {"rank": 48}, "optimizer": {"name": "adamw8bit"}},
    "whole layers, two stages": {"family": "gemma3", "parallel": {"stages": 2, "micro_batches": 2}},
    "whole layers recomputed": {"family": "gemma3", "train": {"recompute": "full"}},
    "labels": {"data": {"loss": "labels"}},
    "two replicas": {"parallel": {"replicas": 2}, "quantization": {"bits": 4}},
}
GEMMA: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS, "layer_types": None, "head_dim": 32,
    "max_position_embeddings": 128, "sliding_window": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    gpt2 = GPT2Config(vocab_size=300, n_positions=128, n_embd=128, n_layer=LAYERS, n_head=4)
    ours = initial_model(as_low_rank(llama, {"attention": 32, "mlp": 48}), 0, "spectral")
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    save_model(folder / "low-rank", ours.config, state.items(), None)
    return {
        "low-rank": folder / "low-rank",
        "llama": saved(LlamaForCausalLM(llama), folder / "llama"),
        "gpt2": saved(GPT2LMHeadModel(gpt2), folder / "gpt2"),
        "gemma3": saved(tiny("Gemma 3", **GEMMA), folder / "gemma3"),
    }


def settings(name: str, bases: dict[str, Path]) -> tuple[FinetuneConfig, Path]:
    case = dict(CASES[name])
    path = bases[case.pop("family", "llama")]
    return build(FinetuneConfig, {"model": {"path": str(path)}, "lora": {"rank": 4}, **case}), path


def packs(config: FinetuneConfig) -> list[torch.Tensor]:
    parallel = config.parallel
    count = parallel.micro_batches * parallel.replicas
    some = examples(EACH, prefix=8, longest=40)
    if config.data.loss == "labels":
        labels: list[tuple[int, ...]] = [(5,), (5, 6), (7, 8, 9)]
        choices = [Choice(np.array(tokens[:-answer]), labels, 0, [1.0, 0.0, 0.0]) for tokens, answer in some]
        return [torch.from_numpy(label_pack(choices, True, EACH * count, count))] * count
    return packs_of(some, EACH, 8) * count


def counted(names: list[str], bases: dict[str, Path]) -> list[tuple[int, int]]:
    """(stage, counted peak of a second step) of this process, for each case."""
    from finhpc.training.engine import Engine
    from finhpc.training.memory import counted_peak, live_tensor_bytes

    found = []
    for name in names:
        gc.collect()
        left = live_tensor_bytes()  # of the engine before, which DeepSpeed does not let go of
        config, path = settings(name, bases)
        lora_model = LoraModel.of(config, open_weights(path, low_rank=True))
        engine = Engine(config, lora_model.hf_config, torch.device("cpu"), lora_model=lora_model)
        mine = packs(config)[: config.parallel.micro_batches]
        engine.train_step(iter(mine), 1e-3)
        _, peak = counted_peak(lambda engine=engine, mine=mine: engine.train_step(iter(mine), 1e-3))
        found.append((engine.stage, peak - left))
    return found


def planned(name: str, bases: dict[str, Path]) -> LoraCosts:
    config, path = settings(name, bases)
    parallel = config.parallel
    one = packs(config)[0]
    size = PackSize(one.shape[2], segments_of(one[0]))
    topology = Topology(parallel.stages, parallel.replicas, EACH, parallel.micro_batches)
    lora_model = LoraModel.of(config, open_weights(path, low_rank=True))
    return LoraCosts(lora_model, size, topology, layouts=1, optimizer=config.optimizer)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_predicted_peak_is_the_counted_one(workers: int, bases: dict[str, Path]) -> None:
    names = [name for name in CASES if settings(name, bases)[0].parallel.workers == workers]
    for worker in run_processes(counted, workers, names, bases):
        for name, (stage, peak) in zip(names, worker, strict=True):
            assert planned(name, bases).stages()[stage].peak_bytes == pytest.approx(peak, rel=0.01), (name, stage)


@pytest.mark.parametrize(("bits", "scheme"), [(8, "int8"), (4, "nf4"), (8, "minmax"), (4, "minmax")])
@pytest.mark.parametrize("shape", [(96, 64), (64, 32 * 257)])
def test_layers_without_content_are_as_large_as_real_ones(bits: int, scheme: str, shape: tuple[int, int]) -> None:
    bias, made = torch.ones(shape[0], dtype=torch.bfloat16), []
    for layer in (freeze(torch.randn(shape), bias, bits, scheme, torch.bfloat16, "w"),
                  SCHEMES[scheme].empty(shape, bias, bits)):  # fmt: skip
        tensors = dict(layer.named_buffers()) | dict(layer.named_parameters())
        if (state := getattr(layer, "state", None)) is not None:
            second = state.state2
            tensors |= {"absmax": state.absmax, "code": state.code, "offset": state.offset}
            tensors |= {"absmax2": second.absmax, "code2": second.code}
        made.append({name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()})
        assert layer.matrix(torch.bfloat16).shape == shape
    assert made[0] == made[1]


def test_operations_are_those_of_the_matrices(bases: dict[str, Path]) -> None:
    plan = planned("16 bits", bases)
    rows, weights = plan.pack.tokens, open_weights(bases["llama"]).skeleton
    blocks = sum(p.numel() for name, p in weights.named_parameters() if p.dim() == 2 and ".layers." in name)
    full = 4.0 * rows * blocks + 6.0 * rows * plan.trained + 12.0 * 128 * plan.pack.pairs
    # The last MLP and the head see the rows alone that predict.
    assert 0.8 * full < plan.operations() < full
    again = planned("blocks recomputed", bases)
    assert 1.4 < again.operations() / plan.operations() < 1.6


def test_the_time_of_a_step(bases: dict[str, Path]) -> None:
    a100 = DEVICES["a100-80gb"]
    cluster = Cluster(replace(a100, launch_s=0.0), 1, 8, 72e9, 0.5, "bf16")
    plan = planned("16 bits", bases)
    pace = plan.pace(cluster)
    assert pace.stage_s == pytest.approx([plan.operations() / (0.5 * 312e12)])
    launched = plan.pace(replace(cluster, device=a100)).stage_s
    assert launched == pytest.approx([len(plan.parts) * 3 * a100.launch_s]), "parts so small wait for their kernels"
    assert pace.step_s == pace.stage_s[0] + pace.exchange_s + pace.optimizer_s
    nf4 = planned("nf4, two micro-batches", bases).pace(cluster)
    assert nf4.stage_s[0] > 1.5 * pace.stage_s[0], "matrices are turned into floats, and moved"
    assert nf4.passes_s == 2 * nf4.stage_s[0]
    assert len(planned("two stages", bases).pace(cluster).stage_s) == 2
