"""What a block keeps for its backward pass, counted, beside FinGPT-HPC's Table IV."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from finhpc.lowrank.replace import ranks_of
from finhpc.models import attention
from finhpc.models.families.registry import make_config, resolve_shape, skeleton
from finhpc.models.initialize import initial_model
from finhpc.models.pipeline import parts_of
from finhpc.settings.pretrain import Method, Model
from finhpc.settings.training import Recompute
from finhpc.training.activation_bytes import block_saved_bytes, saved_bytes

SEQ = 1024
GPT2 = {"preset": "gpt2-127m", "layers": 1, "vocab_size": 101}
LLAMA = {"preset": "llama2-7b", "layers": 1, "vocab_size": 101, "width": 512, "heads": 4, "mlp_width": 1376}
LLAMA2_7B = {"preset": "llama2-7b", "layers": 1, "vocab_size": 101}

# transformers' own attention that is not fused, with all it keeps, and recomputed.
for _name, _module in (("gpt2", modeling_gpt2), ("llama", modeling_llama)):
    AttentionInterface.register(f"{_name}_eager", _module.eager_attention_forward)
    AttentionInterface.register(f"{_name}_eager_again", attention.recomputed(_module.eager_attention_forward))


def counted(
    model: dict[str, Any], attends: str, recompute: Recompute = "none", seq: int = SEQ, meta: bool = False, **more: Any
) -> int:
    """Bytes that one dense block of the shape keeps, with the attention named `attends`."""
    config = make_config(resolve_shape(Model(**model)), ranks_of(Method(kind="dense")))
    for key, value in more.items():
        setattr(config, key, value)
    built: Any = skeleton(config) if meta else initial_model(config, 0, "normal")
    built.config._attn_implementation = attends
    return block_saved_bytes(parts_of(config, recompute), built.train(), 1, seq)


def test_a_storage_counts_once_and_parameters_do_not() -> None:
    linear = nn.Linear(10, 20, bias=False)
    x = torch.randn(7, 10, requires_grad=True)
    assert saved_bytes(lambda: linear(x), linear) == x.nbytes
    assert saved_bytes(lambda: linear(x)) == x.nbytes + linear.weight.nbytes
    assert saved_bytes(lambda: linear(x).exp() + linear(x[:3]).sum(), linear) == x.nbytes + 7 * 20 * 4
    with torch.no_grad():
        assert saved_bytes(lambda: linear(x), linear) == 0


@pytest.mark.parametrize(
    ("model", "attends", "more", "least"),
    [
        (GPT2, "sdpa", {}, 0.93),  # attention and GELU fused
        (GPT2, attention.NAME, {}, 0.95),
        (GPT2, "gpt2_eager", {"activation_function": "gelu_new"}, 0.95),
        (LLAMA, "sdpa", {}, 0.93),
        (LLAMA, attention.NAME, {}, 0.95),
        (LLAMA, "llama_eager", {}, 0.95),
    ],
)
def test_full_keeps_little_but_the_blocks_input(
    model: dict[str, Any], attends: str, more: dict[str, Any], least: float
) -> None:
    none, full = (counted(model, attends, recompute, **more) for recompute in ("none", "full"))
    width = resolve_shape(Model(**model)).width
    assert full == SEQ * width * 4 + SEQ * 8, "the block's input, and the tokens that all blocks share"
    assert 1 - full / none >= least


def table_iv(model: dict[str, Any], seq: int) -> tuple[int, int]:
    """(bytes of q k^T and s, bytes of all) of a block after FinGPT-HPC's Table IV, at its 2 bytes a number.

    Its other variables: x, k, q, v and twice x^o of the model's width, x^u and x^g of the MLP's. GPT-2's MLP has
    two such variables as well, before and after its activation.
    """
    shape = resolve_shape(Model(**model))
    large = 2 * 2 * shape.heads * seq * seq
    return large, large + 2 * seq * (6 * shape.width + 2 * (shape.mlp_width or 4 * shape.width))


def test_the_table_is_read_as_the_paper_adds_it_up() -> None:
    large, whole = table_iv({"preset": "llama2-7b"}, 4096)
    assert 32 * whole / 1e9 == pytest.approx(81, abs=0.5)
    assert 32 * (whole - large) / 1e9 == pytest.approx(12.2, abs=0.2)


@pytest.mark.parametrize(
    ("family", "model", "seq", "share"),
    [
        ("gpt2", GPT2, 1024, 0.49),
        ("gpt2", {**GPT2, "preset": "gpt2-1.5b"}, 1024, 0.49),
        ("llama", LLAMA2_7B, 1024, 0.27),
        ("llama", LLAMA2_7B, 4096, 0.60),
    ],
)
def test_attention_removes_the_bytes_of_the_table_where_it_is_not_fused(
    family: str, model: dict[str, Any], seq: int, share: float
) -> None:
    """As many bytes, but a smaller share: torch never keeps q k^T, and keeps more of the rest than the table lists."""
    none, kept = (counted(model, f"{family}_eager{again}", seq=seq, meta=True) for again in ("", "_again"))
    heads = resolve_shape(Model(**model)).heads
    assert none - kept == heads * seq * seq * 4, "all the probabilities, in float32"
    assert none - kept >= table_iv(model, seq)[0]
    assert 1 - kept / none >= share


@pytest.mark.parametrize(("model", "seq"), [(GPT2, 1024), (LLAMA, 1024), (LLAMA, 200)])
def test_our_attention_keeps_half_of_the_probabilities_or_none(model: dict[str, Any], seq: int) -> None:
    none, kept = (counted(model, name, seq=seq) for name in (attention.NAME, attention.RECOMPUTED))
    heads, q = resolve_shape(Model(**model)).heads, attention.QUERIES
    half = sum(min(q, seq - begin) * min(begin + q, seq) for begin in range(0, seq, q))
    assert none - kept == 4 * heads * half


def test_torchs_kernel_is_recomputed_only_where_it_is_not_fused() -> None:
    fused = {**GPT2, "context": attention.LONGEST + 128}
    none, kept = (counted(fused, name, seq=attention.LONGEST + 128) for name in (attention.NAME, attention.RECOMPUTED))
    assert none == kept, "it keeps no probabilities anyway"
    with_dropout = {**GPT2, "dropout": 0.1}
    none, kept = (counted(with_dropout, name, seq=512) for name in (attention.NAME, attention.RECOMPUTED))
    assert none - kept > 2 * 12 * 512 * 512 * 4, "the probabilities before and after dropout"
