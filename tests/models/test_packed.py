"""Packs of examples against transformers and peft over padded batches."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from finhpc.errors import ConfigError
from finhpc.models.attention import Scores
from finhpc.models.files.source import open_weights
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
from finhpc.models.packing.attention import attend_segments
from finhpc.models.packing.layout import IGNORED, LAYOUT, TARGET, Segments, build_layout, layout_of, segments_of
from finhpc.quantization.schemes import freeze
from finhpc.settings.finetune import FinetuneQuantization, Lora
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.models.packs import examples, pack, packs_of, peft_model, peft_parameters, plain_loss

LORA = Lora(rank=4, init="orthogonal")  # neither factor is zero


def adapted(
    folder: Path, lora: Lora = LORA, device: str = "cpu", **how: Any
) -> tuple[LoraModel, list[LoraPipelineLayer]]:
    bits = FinetuneQuantization(bits=how.pop("bits", 16), scheme=how.pop("scheme", "auto"))
    lora_model = LoraModel(open_weights(folder, low_rank=True), lora, bits, **how)
    return lora_model, [LoraPipelineLayer(part, lora_model, torch.device(device)) for part in lora_model.parts()]


def parameters(layers: list[LoraPipelineLayer]) -> dict[str, Any]:
    return {name: p for layer in layers for name, p in layer.parameters_by_name()}


def loss_of(layers: list[LoraPipelineLayer], packs: list[Tensor]) -> Tensor:
    losses = []
    for data in packs:
        flow: Any = data
        for layer in layers:
            flow = layer(flow)
        losses.append(flow)
    return torch.stack(losses).mean()


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert value.abs().max() > 0, name
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("shared", [0, 6])
def test_loss_and_gradients_are_pefts(tmp_path: Path, make: Any, shared: int, recompute: Any) -> None:
    folder = saved(make(), tmp_path / "base")
    _, layers = adapted(folder, recompute=recompute)
    ours = parameters(layers)
    plain = peft_model(folder, {name: p.detach() for name, p in ours.items()})
    some = examples(8)
    wanted = plain_loss(plain, some)
    wanted.backward()
    loss = loss_of(layers, packs_of(some, 4, shared, padding=3))
    loss.backward()
    assert abs(loss.item() - wanted.item()) <= 1e-5 * wanted.item()
    assert_near({n: p.grad for n, p in ours.items()}, {n: p.grad for n, p in peft_parameters(plain).items()})


def test_a_pack_without_targets_has_loss_zero(tmp_path: Path) -> None:
    _, layers = adapted(saved(tiny_llama(), tmp_path / "base"))
    data = pack(examples(2), 6, 5, 2)
    data[:, TARGET] = IGNORED
    loss = loss_of(layers, [data])
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in parameters(layers).values())


def attended(size: int) -> list[Tensor]:
    """Queries, keys, values, and the gradient of what comes out; of two heads that share keys and values, twice."""
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, heads, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2, 4)]
    return [*(x.requires_grad_() for x in drawn[:3]), drawn[3]]


def masked(q: Tensor, k: Tensor, v: Tensor, data: Tensor) -> Tensor:
    """Attention within a pack, by a mask of tokens x tokens."""
    segments, prefixes, rows = data[0, 2], data[0, 3], torch.arange(data.shape[2])
    same = (segments[:, None] == segments) & (rows[:, None] >= rows)
    sees = (same | ((prefixes[:, None] == segments) & (prefixes[:, None] > 0))) & (segments[:, None] > 0)
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * 0.3
    p = torch.softmax(scores.masked_fill(~sees, -1e30), -1) * sees
    return torch.einsum("hts,shd->thd", p, v.repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("keep", "fused", "at_once"), [(True, False, 0), (False, False, 0), (False, True, 0), (False, True, 9999)]
)
@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("longest", [14, 300])
def test_attention_is_that_of_a_mask(
    monkeypatch: pytest.MonkeyPatch, keep: bool, fused: bool, at_once: int, shared: int, longest: int
) -> None:
    monkeypatch.setattr("finhpc.models.packing.attention.AT_ONCE", at_once)
    data = pack(examples(6, prefix=5, longest=longest), shared, 9, 1, padding=4)
    q, k, v, grad = attended(data.shape[2])
    wanted = masked(q, k, v, data)
    expected = torch.autograd.grad(wanted, (q, k, v), grad)
    out = attend_segments(q, k, v, build_layout(segments_of(data[0]), data.device, fused), Scores(0.3), keep)
    assert torch.allclose(out, wanted, atol=1e-12)
    for found, value in zip(torch.autograd.grad(out, (q, k, v), grad), expected, strict=True):
        assert torch.allclose(found, value, atol=1e-12)


def test_the_fused_layout_has_few_groups_and_more_rows_than_repeats() -> None:
    segments = segments_of(pack(examples(9, prefix=5, longest=60), 5, 9, 1)[0])
    groups = build_layout(segments, torch.device("cpu"), fused=True).groups
    assert [(len(group.spans), len(group.prefix)) for group in groups] == [(1, 0), (9, 5)]
    assert len(build_layout(segments, torch.device("cpu")).groups) > 4, "by length"
    short = [(5 + 50 * i, 55 + 50 * i) for i in range(15)]
    skewed = Segments([(None, [(0, 5)]), ((0, 5), short), ((0, 5), [(755, 1255)])], [], [], 1.0)
    groups = build_layout(skewed, torch.device("cpu"), fused=True).groups
    assert [group.rows.numel() for group in groups] == [5, 750, 500], "the long one stays apart"


def test_a_pack_remembers_its_layout_and_a_copy_is_known_by_its_content() -> None:
    data = pack(examples(6, prefix=5), 5, 9, 1)
    found = layout_of(data)
    assert getattr(data, LAYOUT) is found
    with patch("finhpc.models.packing.layout.segments_of", side_effect=AssertionError("read again")):
        assert layout_of(data) is found
        assert layout_of(data.clone()) is found


@pytest.mark.parametrize(("bits", "scheme"), [(8, "int8"), (4, "nf4")])
def test_quantised_bases_give_bitsandbytes_numbers(tmp_path: Path, bits: int, scheme: str) -> None:
    """Packs to what rounding allows; the frozen layers, in bitsandbytes' place in the plain model, to the bit."""
    folder = saved(_wide(), tmp_path / "base")
    _, layers = adapted(folder, bits=bits, scheme=scheme)
    ours = parameters(layers)
    start = {name: p.detach() for name, p in ours.items()}
    # In training mode: in evaluation bitsandbytes packs NF4 anew for CPUs with bfloat16, and computes in that.
    plain = peft_model(folder, start, quantization_config=_bitsandbytes(bits), dtype=torch.float32).train()
    some = examples(8)
    wanted = plain_loss(plain, some)
    wanted.backward()
    gradients = {name: p.grad for name, p in peft_parameters(plain).items()}
    loss = loss_of(layers, packs_of(some, 4, 6))
    loss.backward()
    assert abs(loss.item() - wanted.item()) <= 1e-5 * wanted.item()
    assert_near({n: p.grad for n, p in ours.items()}, gradients)
    assert _put_frozen_layers(plain, folder, bits, scheme) == 14
    plain.zero_grad()
    same = plain_loss(plain, some)
    same.backward()
    assert torch.equal(same, wanted)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in peft_parameters(plain).items())


def _bitsandbytes(bits: int) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    how = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, **{f"bnb_4bit_{name}": value for name, value in how.items()})


def _put_frozen_layers(plain: Any, folder: Path, bits: int, scheme: str) -> int:
    """Replace bitsandbytes' layers of a peft model by frozen ones of the same weights; how many."""
    weights, count = open_weights(folder), 0
    for name, module in list(plain.named_modules()):
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit") and name.endswith(".base_layer"):
            own = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            frozen = freeze(weights.read(f"{own}.weight").to(plain.device), None, bits, scheme, torch.float32, own)
            plain.set_submodule(name, frozen)
            count += 1
    return count


def _wide() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (Lora(rank=0), ["lora.rank=0"]),
        (
            Lora(rank=40),
            ["lora.rank=40 does not fit model.layers.*.self_attn.k_proj (16 x 32", "; use 1 to 16."],
        ),
        (Lora(targets=["query"]), ["lora.targets=query matches no linear layer", "q_proj"]),
        (Lora(rank=3, init="orthogonal"), ["even"]),
        (Lora(targets=[".*query.*"]), ["lora.targets=.*query.* matches no linear layer", "q_proj"]),
        (Lora(targets=["(q_proj"]), ["lora.targets=(q_proj is neither a module name nor a regular expression (miss"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_together(tmp_path: Path, lora: Lora, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        adapted(saved(tiny_llama(), tmp_path / "base"), lora)
    for word in words:
        assert word in str(error.value)


def test_a_pack_never_takes_the_positions_of_another_model(tmp_path: Path) -> None:
    """A pack stores them by the id of the config, so that no later config may get that id."""
    lora_model, layers = adapted(saved(tiny_llama(), tmp_path / "base"))
    data = packs_of(examples(2), 2, 0)[0]
    loss_of(layers, [data])
    config = weakref.ref(lora_model.hf_config)
    del lora_model, layers
    gc.collect()
    assert config() is not None
