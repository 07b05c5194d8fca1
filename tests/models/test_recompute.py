"""Recomputation: the same numbers to the bit, and blocks as parts of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finhpc.lowrank.replace import ranks_of
from finhpc.models.attention import NAME, RECOMPUTED
from finhpc.models.families.registry import make_config, parameter_count, resolve_shape, skeleton
from finhpc.models.initialize import initial_model, random_fill
from finhpc.models.pipeline import PipelineLayer, estimated_costs, parts_of, stage_borders
from finhpc.models.recompute import draws_random
from finhpc.settings.pretrain import Method, Model
from finhpc.settings.training import Recompute

SEQ, VOCAB = 150, 101  # more than one block of queries


def config_of(preset: str, kind: str, **model: Any) -> Any:
    tree = {"preset": preset, "layers": 2, "width": 32, "heads": 4, "vocab_size": VOCAB, "context": SEQ, **model}
    return make_config(resolve_shape(Model(**tree)), ranks_of(Method.model_validate({"kind": kind, "rank": 4})))


def trained(config: Any, recompute: Recompute, bf16: bool) -> list[Tensor]:
    """Loss, gradients and the random state after two passes, whose gradients add up."""
    weights = initial_model(config, 1, "spectral")
    model: Any = skeleton(config, recompute)
    model.load_state_dict(weights.state_dict(keep_vars=True), assign=True)
    row = parts_of(config, recompute)
    arguments: Any = torch.device("cpu"), random_fill(config, 1, "spectral"), "bf16" if bf16 else "fp32"
    layers = [PipelineLayer(part, model, *arguments).train() for part in row]
    torch.manual_seed(0)
    losses = []
    for _ in range(2):
        data: Any = torch.randint(0, VOCAB, (3, SEQ))
        for layer in layers:
            data = layer(data)
        data.backward()
        losses.append(data.detach())
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [*losses, *gradients, torch.get_rng_state()]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("preset", "kind", "more"),
    [
        ("gpt2-tiny", "dense", {}),
        ("gpt2-tiny", "low_rank", {}),
        ("gpt2-tiny", "low_rank", {"dropout": 0.1}),
        ("llama-tiny", "dense", {"kv_heads": 2}),
        ("llama-tiny", "low_rank", {}),
    ],
)
def test_loss_and_gradients_are_the_same_to_the_bit(preset: str, kind: str, more: dict[str, Any], bf16: bool) -> None:
    config = config_of(preset, kind, **more)
    plain = trained(config, "none", bf16)
    for recompute in ("attention", "full"):
        found = trained(config, recompute, bf16)  # type: ignore[arg-type]
        assert len(found) == len(plain)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), recompute


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny"])
def test_a_recomputed_block_is_one_part_with_the_modules_of_both_halves(preset: str) -> None:
    config = config_of(preset, "dense")
    halves, blocks = parts_of(config), parts_of(config, "full")
    assert [part.kind for part in blocks].count("block") == 2
    assert not {"attention", "mlp"} & {part.kind for part in blocks}
    assert [name for part in blocks for name in part.names] == [name for part in halves for name in part.names]
    assert [part.kind for part in parts_of(config, "attention")] == [part.kind for part in halves]


def test_stages_of_recomputed_blocks_begin_between_them_and_count_their_second_forward_pass() -> None:
    config = config_of("gpt2-tiny", "dense")
    model = skeleton(config)
    row, halves = parts_of(config, "full"), parts_of(config)
    costs, before = estimated_costs(row, model, SEQ), estimated_costs(halves, model, SEQ)
    assert [part.kind for part in row] == ["embedding", "positions", "block", "block", "norm", "head"]
    assert costs[2] == pytest.approx(4 / 3 * (before[2] + before[3]))
    assert costs[-1] == before[-1]
    assert stage_borders(row, [0.0, 0.0, 3.0, 3.0, 0.0, 1.0], 2) == [0, 3, 6]
    assert stage_borders(row, [0.0, 0.0, 3.0, 3.0, 0.0, 9.0], 2) == [0, 4, 6]


def test_each_skeleton_has_its_own_attention() -> None:
    config = config_of("llama-tiny", "dense")
    recomputing: Any = skeleton(config, "attention")
    parameter_count(config)  # makes another skeleton of the same config
    assert recomputing.config._attn_implementation == RECOMPUTED
    assert recomputing.model.layers[0].self_attn.config is recomputing.config
    assert skeleton(config, "full").config._attn_implementation == NAME  # type: ignore[union-attr]


def test_only_dropout_in_training_draws_random_numbers() -> None:
    wet: Any = skeleton(config_of("gpt2-tiny", "dense", dropout=0.1))
    dry: Any = skeleton(config_of("gpt2-tiny", "dense"))
    assert draws_random(wet.train().transformer.h[0].attn)
    assert not draws_random(wet.eval().transformer.h[0].attn)
    assert not draws_random(wet.train().transformer.h[0].ln_1)
    assert not draws_random(dry.train())
    llama: Any = skeleton(config_of("llama-tiny", "dense")).train()
    assert not draws_random(llama)
    llama.model.layers[0].self_attn.attention_dropout = 0.1
    assert draws_random(llama)
