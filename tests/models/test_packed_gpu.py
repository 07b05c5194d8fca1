"""Packs on a GPU against transformers and peft on the same GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finhpc.models.attention import Scores
from finhpc.models.packing.attention import attend_segments
from finhpc.models.packing.layout import layout_of
from tests.gpu import DEVICE, ON, needs_gpu
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.models.packs import examples, pack, packs_of, peft_model, peft_parameters, plain_loss
from tests.models.test_packed import (
    _bitsandbytes,
    _put_frozen_layers,
    _wide,
    adapted,
    assert_near,
    attended,
    loss_of,
    masked,
    parameters,
)

pytestmark = needs_gpu

Trained = tuple[Tensor, dict[str, Tensor]]  # loss, gradients of the adapters


def ours(folder: Path, **how: Any) -> tuple[Trained, dict[str, Tensor]]:
    """What packs give, and what the adapters start from."""
    _, layers = adapted(folder, device=ON, **how)
    named = parameters(layers)
    loss = loss_of(layers, [data.to(DEVICE) for data in packs_of(examples(8), 4, 6, padding=3)])
    loss.backward()
    return (loss, {name: p.grad for name, p in named.items()}), {name: p.detach() for name, p in named.items()}


def plain(model: Any) -> Trained:
    model.zero_grad()
    loss = plain_loss(model, examples(8))
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in peft_parameters(model).items()}


def assert_close(found: Trained, wanted: Trained, loss: float, gradients: float) -> None:
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=loss)
    assert_near(found[1], wanted[1], gradients)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_loss_and_gradients_are_pefts(tmp_path: Path, make: Any) -> None:
    folder = saved(make(), tmp_path / "base")
    found, start = ours(folder)
    wanted = plain(peft_model(folder, start).to(DEVICE))
    assert_close(found, wanted, 1e-4, 1e-4)
    for recompute in ("attention", "full"):
        again, _ = ours(folder, recompute=recompute)
        assert torch.equal(again[0], found[0]), recompute
        assert_near(again[1], found[1], 1e-6)
    rounded, _ = ours(folder, bf16=True)
    assert rounded[0].item() != found[0].item()
    assert_close(rounded, wanted, 2e-2, 0.1)


@pytest.mark.parametrize(("bits", "scheme", "loss", "gradients"), [(8, "int8", 1e-2, 0.1), (4, "nf4", 1e-4, 1e-3)])
def test_quantised_bases_give_bitsandbytes_numbers(
    tmp_path: Path, bits: int, scheme: str, loss: float, gradients: float
) -> None:
    """int8 loosely: which columns it computes in float depends on all rows that are there at once."""
    folder = saved(_wide(), tmp_path / "base")
    found, start = ours(folder, bits=bits, scheme=scheme)
    model = peft_model(folder, start, quantization_config=_bitsandbytes(bits), dtype=torch.float32).train()
    assert model.device.type == ON
    wanted = plain(model)
    assert_close(found, wanted, loss, gradients)
    assert _put_frozen_layers(model, folder, bits, scheme) == 14
    assert_close(plain(model), wanted, 1e-5, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [14, 300])
def test_attention_is_that_of_a_mask(longest: int, dtype: torch.dtype) -> None:
    data = pack(examples(6, prefix=5, longest=longest), 5, 9, 1, padding=4)
    *exact, grad = attended(data.shape[2])
    wanted = masked(*exact, data)
    expected = [wanted, *torch.autograd.grad(wanted, exact, grad)]
    mine = [x.detach().to(DEVICE, dtype).requires_grad_() for x in exact]
    for keep in (True, False):
        out = attend_segments(*mine, layout_of(data.to(DEVICE)), Scores(0.3), keep)
        found = [out, *torch.autograd.grad(out, mine, grad.to(out))]
        for value, right in zip(found, expected, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            assert (value.double().cpu() - right).norm() <= tolerance * right.norm()
