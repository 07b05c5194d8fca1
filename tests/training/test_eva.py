"""Adapters that begin with the principal components of their layers' inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from finhpc.data.examples.batches import Batches
from finhpc.data.examples.examples import Arrays, Examples
from finhpc.errors import ConfigError
from finhpc.models.files.source import open_weights
from finhpc.models.lora.model import LoraModel
from finhpc.models.lora.targets import target_shapes
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig, Lora
from finhpc.settings.training import Parallel
from finhpc.training.finetuning.batches import PackedBatches
from finhpc.training.finetuning.eva import EXAMPLES, PACKS, begin_with_inputs, check_inputs
from tests.models.dense import saved, tiny_llama
from tests.models.packs import examples
from tests.training.processes import run_processes

RANK = 4


def arrays(count: int) -> Arrays:
    some = examples(count, prefix=8)
    lengths = [len(tokens) for tokens, _ in some]
    answers = [[i >= len(tokens) - answer for i in range(len(tokens))] for tokens, answer in some]
    return Arrays(
        np.array([token for tokens, _ in some for token in tokens], np.int32),
        np.cumsum([0, *lengths]),
        np.array([learned for one in answers for learned in one]),
        np.zeros(count, np.int32),
    )


def begun(folder: Path, stages: int, replicas: int, train: Arrays, rank: int = RANK, dora: bool = False) -> Any:
    from finhpc.training.engine import Engine

    config = build(
        FinetuneConfig,
        {
            "model": {"path": str(folder)},
            "lora": {"rank": rank, "init": "eva", "dora": dora},
            "parallel": {"stages": stages, "replicas": replicas, "micro_batch_size": 2, "micro_batches": 2},
            "train": {"steps": 2},
        },
    )
    lora_model = LoraModel.of(config, open_weights(folder, low_rank=True))
    engine = Engine(config, lora_model.hf_config, torch.device("cpu"), lora_model=lora_model)
    packing = Batches(config.parallel, config.train.seed)
    begin_with_inputs(engine, PackedBatches(Examples(train, train), packing))
    return {name: p.detach().clone() for name, p in engine.trained_parameters().items()}


def inputs_of(folder: Path, train: Arrays, name: str) -> Tensor:
    """The inputs of a layer at all tokens of the first examples, by transformers; the last token predicts nothing."""
    model, rows = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: rows.append(given[0][0]))
    packing = Batches(Parallel(micro_batch_size=EXAMPLES), 0)
    with torch.no_grad():
        for step in range(PACKS):
            for index in packing.samples(len(train), step):
                model(torch.from_numpy(train.example(int(index))[0][:-1]).long()[None])
    hook.remove()
    return torch.cat(rows).double()


@pytest.mark.parametrize("dora", [False, True])
def test_a_has_the_directions_in_which_inputs_vary_most(tmp_path: Path, dora: bool) -> None:
    folder, train = saved(tiny_llama(layers=2), tmp_path / "base"), arrays(40)
    (found,) = run_processes(begun, 1, folder, 1, 1, train, RANK, dora)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
        rows, a = inputs_of(folder, train, name), found[f"{name}.A"].double()
        rows = rows - rows.mean(0)
        best = torch.linalg.svdvals(rows)[:RANK].square().sum()
        assert (rows @ a.T).square().sum() > 0.95 * best
        torch.testing.assert_close(a @ a.T, torch.eye(RANK, dtype=torch.float64), atol=1e-4, rtol=0)
        assert not found[f"{name}.B"].any()


def test_stages_and_replicas_begin_alike(tmp_path: Path) -> None:
    folder, train = saved(tiny_llama(layers=2), tmp_path / "base"), arrays(40)
    (one,) = run_processes(begun, 1, folder, 1, 1, train)
    four = run_processes(begun, 4, folder, 2, 2, train)
    assert {name for rank in four for name in rank} == set(one)
    for rank in four:
        assert all(torch.equal(value, one[name]) for name, value in rank.items())


def test_an_adapter_of_the_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.init=eva does not analyze the inputs of lm_head"):
        target_shapes(tiny_llama(), Lora(init="eva", targets=["all-linear", "lm_head"]), 16)


def test_more_components_than_inputs_are_refused() -> None:
    """The last block's second half sees only tokens that predict one."""
    packing = Batches(Parallel(micro_batch_size=2), 0)
    train = arrays(40)
    marks = np.zeros(len(train.answer), bool)
    marks[train.offsets[1:] - 1] = True
    one_each = Arrays(train.tokens, train.offsets, marks, train.source)
    check_inputs(one_each, packing, PACKS * EXAMPLES // 2)
    with pytest.raises(ConfigError, match=r"lora.rank=129, and 256 examples have 256 tokens .* use lora.rank=128"):
        check_inputs(one_each, packing, PACKS * EXAMPLES // 2 + 1)
