"""Losses and gradients of rsLoRA, DoRA and LoftQ are compared with peft's, and DoRA's also with its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finhpc.errors import ConfigError
from finhpc.models.files.source import open_weights
from finhpc.models.lora.layers import DoraLinear
from finhpc.models.lora.targets import scale_of
from finhpc.quantization.frozen import FrozenFloat
from finhpc.quantization.schemes import freeze
from finhpc.settings.finetune import Lora
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.models.packs import examples, packs_of, peft_model, peft_parameters, plain_loss
from tests.models.test_packed import _bitsandbytes, _wide, adapted, assert_near, loss_of, parameters

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, peft's
    "rslora": ({"rslora": True, "lora_alpha": 3.0}, {"use_rslora": True, "lora_alpha": 3.0}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "both": ({"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
}


def shaken(ours: dict[str, Any]) -> None:
    """Magnitudes that are not the lengths of the rows any more."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in ours.items():
            if name.endswith(".magnitude"):
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=draw))


def lora_of(kind: str, **more: Any) -> Lora:
    return Lora.model_validate({"rank": 4, "init": "orthogonal"} | KINDS[kind][0] | more)


@pytest.mark.parametrize(
    ("make", "kind", "recompute"),
    [
        *((tiny_llama, kind, "none") for kind in KINDS),
        (tiny_gpt2, "dora", "none"),  # its layers have biases, which no gain applies to
        (tiny_llama, "dora", "full"),
    ],
)
def test_loss_and_gradients_of_a_step_are_pefts(tmp_path: Path, make: Any, kind: str, recompute: Any) -> None:
    folder = saved(make(), tmp_path / "base")
    lora_model, layers = adapted(folder, lora_of(kind), recompute=recompute)
    ours = parameters(layers)
    assert {name: tuple(p.shape) for name, p in ours.items()} == lora_model.adapter_shapes
    shaken(ours)
    plain = peft_model(folder, {name: p.detach() for name, p in ours.items()}, lora=KINDS[kind][1])
    some = examples(8)
    wanted = plain_loss(plain, some)
    wanted.backward()
    for layer in layers:
        layer.derived.set()  # as the engine does: for all micro-batches of a step
    packs = packs_of(some, 4, 6, padding=3)
    losses = []
    for data in packs:
        loss = loss_of(layers, [data]) / len(packs)
        loss.backward()
        losses.append(loss.item())
    assert abs(sum(losses) - wanted.item()) <= 1e-5 * wanted.item()
    assert_near({n: p.grad for n, p in ours.items()}, {n: p.grad for n, p in peft_parameters(plain).items()})


@pytest.mark.parametrize(("bits", "scheme"), [(8, "int8"), (4, "nf4")])
def test_dora_on_a_quantized_base_is_pefts_on_bitsandbytes(tmp_path: Path, bits: int, scheme: str) -> None:
    folder = saved(_wide(), tmp_path / "base")
    _, layers = adapted(folder, lora_of("dora"), bits=bits, scheme=scheme)
    ours = parameters(layers)
    start = {name: p.detach().clone() for name, p in ours.items()}
    how = {"quantization_config": _bitsandbytes(bits), "dtype": torch.float32}
    plain = peft_model(folder, dict(start), lora=KINDS["dora"][1], **how).train()
    own = {name.removeprefix("base_model.model."): m for name, m in plain.named_modules() if hasattr(m, "lora_A")}
    assert len(own) == 14
    for name, module in own.items():  # what peft begins with: the lengths of the rows it dequantizes
        module.lora_magnitude_vector["default"].update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A["default"].weight,
            lora_B=module.lora_B["default"].weight,
            scaling=module.scaling["default"],
        )
        torch.testing.assert_close(
            module.lora_magnitude_vector["default"].weight, start[f"{name}.magnitude"], rtol=1e-5, atol=0
        )
    some = examples(8)
    wanted = plain_loss(plain, some)
    wanted.backward()
    loss = loss_of(layers, packs_of(some, 4, 6))
    loss.backward()
    assert abs(loss.item() - wanted.item()) <= 1e-5 * wanted.item()
    gradients = {n: p.grad for n, p in peft_parameters(plain).items()}
    assert_near({n: p.grad for n, p in ours.items()}, gradients, 1e-4)


def dora_by_formula(
    x: Tensor, w: Tensor, bias: Tensor, factors: tuple[Tensor, Tensor, Tensor], scale: float, drop: Tensor | None
) -> Tensor:
    """Equation 5 of the paper, with the lengths as constants; with dropout the base's own product sees all of x."""
    a, b, m = factors
    v = w + scale * b @ a
    gain = m / v.detach().norm(dim=1)
    kept = x if drop is None else x * drop
    return x @ w.T + bias + (gain - 1) * (kept @ w.T) + gain * scale * (kept @ a.T @ b.T)


@pytest.mark.parametrize("drops", [False, True])
def test_dora_is_its_formula(monkeypatch: pytest.MonkeyPatch, drops: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    w, bias, x = (torch.randn(size, generator=draw) for size in ((5, 6), (5,), (7, 6)))
    layer = DoraLinear(
        FrozenFloat(w, bias.clone()),
        torch.randn(2, 6, generator=draw),
        torch.randn(5, 2, generator=draw),
        1.5,
        dropout=0.5 if drops else 0.0,
    )
    shaken({"x.magnitude": layer.magnitude})
    keep = torch.tensor([2.0, 0, 2, 2, 0, 0])
    monkeypatch.setattr("torch.nn.functional.dropout", lambda rows, p, training=True: rows * keep if p else rows)
    factors = [p.detach().double().requires_grad_() for p in (layer.A, layer.B, layer.magnitude)]
    x_wide = x.double().requires_grad_()
    wanted = dora_by_formula(x_wide, w.double(), bias.double(), tuple(factors), 1.5, keep.double() if drops else None)  # type: ignore[arg-type]
    weights = torch.randn(7, 5, generator=draw)
    (wanted * weights).sum().backward()
    out = layer(x.requires_grad_())
    (out * weights).sum().backward()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    for found, by_formula in zip((layer.A, layer.B, layer.magnitude, x), (*factors, x_wide), strict=True):
        assert found.grad is not None
        assert by_formula.grad is not None
        torch.testing.assert_close(found.grad.double(), by_formula.grad, rtol=1e-5, atol=1e-5)
    z, matrix = layer.as_product(x)
    torch.testing.assert_close((z @ matrix.T + bias).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_row_that_a_unit_step_lengthens_by_hand() -> None:
    """W = (3, 4), B A = (0, 8): the row (3, 12) has length 12.37; m = 10 stretches it to (2.425, 9.701)."""
    layer = DoraLinear(FrozenFloat(torch.tensor([[3.0, 4.0]]), None), torch.tensor([[0.0, 4.0]]), torch.ones(1, 1), 2.0)
    assert layer.magnitude.item() == pytest.approx(153**0.5)
    with torch.no_grad():
        layer.magnitude.fill_(10)
    assert layer(torch.eye(2)).flatten().tolist() == pytest.approx([30 / 153**0.5, 120 / 153**0.5])


def test_a_gain_is_not_rounded_to_the_type_of_the_outputs() -> None:
    """1 + 3/512 would be 1 + 4/512 in bfloat16, for every output; outputs are rounded one by one."""
    layer = DoraLinear(FrozenFloat(torch.eye(4, dtype=torch.bfloat16), None), torch.zeros(1, 4), torch.zeros(4, 1), 1.0)
    x = (1 + torch.rand(4096, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    before = layer(x).float().mean().item()
    with torch.no_grad():
        layer.magnitude.mul_(1 + 3 / 512)
    assert layer(x).float().mean().item() / before == pytest.approx(1 + 3 / 512, abs=1e-3)


@pytest.mark.parametrize(("bits", "scheme"), [(4, "nf4"), (8, "int8"), (4, "minmax")])
@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_begins_with_the_best_low_rank_matrix_of_what_rounding_lost(
    tmp_path: Path, bits: int, scheme: str, rslora: bool
) -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition  # peft's own initialization needs a GPU

    folder = saved(tiny_llama(), tmp_path / "base")
    lora = Lora(rank=4, lora_alpha=12.0, init="loftq", rslora=rslora, targets=["o_proj"])
    _, layers = adapted(folder, lora, bits=bits, scheme=scheme)
    ours, weights = parameters(layers), open_weights(folder)
    assert len(ours) == 6
    for name in {name.rpartition(".")[0] for name in ours}:
        rows = weights.read(f"{name}.weight").float()
        lost = rows - freeze(rows, None, bits, scheme, torch.float32, name).matrix(torch.float32)
        theirs = _low_rank_decomposition(lost, reduced_rank=4)
        found = scale_of(lora) * ours[f"{name}.B"] @ ours[f"{name}.A"]
        torch.testing.assert_close(found.detach(), theirs["L"] @ theirs["R"], rtol=1e-4, atol=1e-6)
        assert (lost - found).norm() < 0.9 * lost.norm()


def test_loftq_of_a_layer_that_stays_in_float_begins_as_by_default(tmp_path: Path) -> None:
    folder = saved(tiny_llama(tied=False), tmp_path / "base")
    start = {}
    for init in ("loftq", "default"):
        lora = Lora(rank=4, init=init, targets=["q_proj", "lm_head"])  # type: ignore[arg-type]
        start[init] = parameters(adapted(folder, lora, bits=4, scheme="nf4")[1])
    assert torch.equal(start["loftq"]["lm_head.A"], start["default"]["lm_head.A"])
    assert not start["loftq"]["lm_head.B"].any()
    assert start["loftq"]["model.layers.0.self_attn.q_proj.B"].any()


def test_loftq_of_weights_that_rounding_does_not_change_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        rows = layer.self_attn.q_proj.weight
        rows.data = freeze(rows.data, None, 8, "minmax", torch.float32, "q").matrix(torch.float32)
    with pytest.raises(ConfigError, match=r"lora.init=loftq has nothing to start from: .*q_proj"):
        adapted(saved(model, tmp_path / "base"), Lora(rank=4, init="loftq"), bits=8, scheme="minmax")


@pytest.mark.parametrize(
    ("lora", "bits", "said"),
    [
        ({"init": "loftq"}, 16, "lora.init=loftq starts from what quantizing the base lost"),
        ({"init": "loftq"}, 8, "lora.init=loftq needs dense layers"),
        ({"dora": True}, 16, "lora.dora=true needs dense layers"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(tmp_path: Path, lora: dict[str, Any], bits: int, said: str) -> None:
    from tests.generation.folders import tiny_folder

    base = tiny_folder(tmp_path / "base", "llama", "low_rank")
    with pytest.raises(ConfigError) as caught:
        adapted(base, Lora.model_validate({"rank": 4} | lora), bits=bits)
    assert said in str(caught.value)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert scale_of(Lora(rank=16, lora_alpha=8.0)) == 0.5
    assert scale_of(Lora(rank=16, lora_alpha=8.0, rslora=True)) == 2.0
