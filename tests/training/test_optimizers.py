"""Each optimizer against its paper's formulas in float64, and what all of them must do: resume, forget, be counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finhpc.errors import ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.initialize import generator_of
from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.kind import blocks_of
from finhpc.training.optimizers.loro import exact_step
from finhpc.training.optimizers.muon import matrices_in, pieces
from finhpc.training.optimizers.newton_schulz import COEFFICIENTS, STEPS, orthogonalize
from finhpc.training.optimizers.registry import OPTIMIZERS, check_optimizer, check_taken
from finhpc.training.optimizers.stage import (
    StageOptimizer,
    drop_parameters,
    init_state,
    make_optimizer,
    moments,
    product_operations,
    set_lr,
    state_bytes,
)

NAMES = [name for name, _ in OPTIMIZERS.own()]


def settings(**values: Any) -> Optimizer:
    return Optimizer.model_validate({"lr": 1e-2, **values})


def model() -> dict[str, nn.Parameter]:
    """An embedding, and blocks with a dense matrix, a fused one, two pairs and a bias; some have over 4,096 weights."""
    torch.manual_seed(0)
    pair, wide = LowRankLinear(12, 8, 4, bias=True), LowRankLinear(96, 80, 48, bias=False)
    named = {
        "wte.weight": nn.Parameter(torch.randn(90, 64)),
        "h.0.fc.weight": nn.Parameter(torch.randn(10, 4)),
        "h.0.c_attn.weight": nn.Parameter(torch.randn(6, 18)),
        **{f"h.0.proj.{name}": p for name, p in pair.named_parameters()},
        **{f"h.1.proj.{name}": p for name, p in wide.named_parameters()},
    }
    for parameter in named.values():
        nn.init.normal_(parameter)
    return named


def stepped(optimizer: StageOptimizer, named: dict[str, nn.Parameter], seed: int) -> None:
    for i, parameter in enumerate(named.values()):
        generator = torch.Generator().manual_seed(100 * seed + i)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def by_svd(matrix: np.ndarray) -> np.ndarray:
    """Newton-Schulz's result from singular values alone, in float64: U f(s / |X|) V^T."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / np.linalg.norm(matrix.astype(np.float64))
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return np.asarray((u * s) @ v)


def test_gram_matrices_orthogonalize_as_the_matrices_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 30), (30, 8), (8, 8), (5, 64), (96, 384), (8, 9), (1536, 96)]
    matrices = [torch.randn(shape, generator=generator) * 10**i for i, shape in zip(range(-3, 4), shapes, strict=True)]
    kept = [matrix.clone() for matrix in matrices]
    found = dict(orthogonalize(matrices))
    assert len(found) == len(matrices)
    for i, matrix in enumerate(kept):
        result = found[i]
        expected = by_svd(matrix.numpy())
        error = np.linalg.norm(result.double().numpy() - expected) / np.linalg.norm(expected)
        limit = 2e-4 if matrix.shape in ((8, 8), (8, 9)) else 1e-5  # square ones have tiny singular values
        assert error < limit, (matrix.shape, error)
    assert all(torch.equal(matrix, before) for matrix, before in zip(matrices, kept, strict=True))
    [(_, result)] = orthogonalize([torch.zeros(3, 4)])
    assert torch.equal(result, torch.zeros(3, 4))


def test_muon_moves_matrices_of_blocks_by_their_orthogonal_momentum() -> None:
    named, decay, lr = model(), 0.1, 1e-2
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = make_optimizer(named, settings(name="muon", weight_decay=decay))
    set_lr(optimizer, lr)
    buffer: dict[str, Any] = {}
    expected = {name: value.double().numpy() for name, value in before.items()}
    for step in range(2):
        stepped(optimizer, named, step)
        for name, parameter in named.items():
            if not name.startswith("h.") or parameter.dim() < 2:
                continue
            assert parameter.grad is not None
            grad = parameter.grad.double().numpy()
            buffer[name] = 0.95 * buffer.get(name, 0) + 0.05 * grad
            nesterov = 0.95 * buffer[name] + 0.05 * grad
            matrices = np.split(nesterov, 3, axis=1) if "c_attn" in name else [nesterov]  # q, k and v: (6, 6) each
            rates = [0.2 * max(matrix.shape) ** 0.5 for matrix in matrices]
            update = np.concatenate([r * by_svd(m) for r, m in zip(rates, matrices, strict=True)], axis=1)
            expected[name] = (1 - lr * decay) * expected[name] - lr * update
    moved = list(buffer)
    assert moved == [name for name in named if OPTIMIZERS["muon"].takes(name, tuple(named[name].shape))]
    assert len(moved) == 6
    for name in moved:
        update, exact = (
            value - before[name].double().numpy() for value in (named[name].detach().numpy(), expected[name])
        )
        assert np.linalg.norm(update - exact) < 0.03 * np.linalg.norm(exact), name  # torch iterates in bfloat16


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_what_is_no_matrix_of_a_block_has_its_own_rate(name: str) -> None:
    named, alone = model(), model()
    rest = [other for other, p in named.items() if not other.startswith("h.") or p.dim() < 2]
    assert rest == ["wte.weight", "h.0.proj.B.bias"]
    optimizer = make_optimizer(named, settings(name=name, lr=1e-2, lr_adamw=4e-3))
    plain = make_optimizer({other: alone[other] for other in rest}, settings(lr=4e-3))
    for step in range(3):
        set_lr(optimizer, 5e-3)  # half of the peak
        set_lr(plain, 2e-3)
        stepped(optimizer, named, step)
        for other in rest:
            alone[other].grad = named[other].grad
        plain.step()
    for other in rest:
        torch.testing.assert_close(named[other], alone[other])


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("transformer.h.0.attn.c_attn.weight", (4, 12), [(4, 4)] * 3),
        ("transformer.h.0.attn.c_attn.W", (12, 4), [(4, 4)] * 3),
        ("transformer.h.0.attn.c_attn.B.weight", (12, 2), [(12, 2)]),
        ("transformer.h.0.attn.c_attn.A.weight", (2, 4), [(2, 4)]),
        ("transformer.h.0.mlp.c_fc.weight", (4, 12), [(4, 12)]),
    ],
)
def test_queries_keys_and_values_are_matrices_of_their_own(name: str, shape: Any, expected: Any) -> None:
    others = {"transformer.h.0.attn.c_attn.A.weight": (2, 4), "transformer.h.0.attn.c_attn.B.weight": (12, 2)}
    whole = torch.arange(float(np.prod(shape))).view(shape)
    found = pieces(name, whole, matrices_in(name, {name: shape} | others))
    assert [tuple(piece.shape) for piece in found] == expected
    assert torch.equal(torch.cat(found, int(shape[1] > shape[0])), whole)


def test_spectron_takes_the_steps_of_its_algorithm() -> None:
    named, decay, lr, beta = model(), 0.1, 1e-2, 0.9
    factors = [name for name in named if name.startswith("h.") and name.endswith((".A.weight", ".B.weight"))]
    exact = {name: named[name].detach().double().numpy() for name in factors}
    buffer: dict[str, Any] = dict.fromkeys(factors, 0.0)
    vector = {name: np.ones(len(named[name])) / len(named[name]) ** 0.5 for name in factors}
    optimizer = make_optimizer(named, settings(name="spectron", weight_decay=decay, momentum=beta))
    set_lr(optimizer, lr)
    for step in range(6):
        stepped(optimizer, named, step)
        sigma = {}
        for name in factors:
            exact[name] = (1 - lr * decay) * exact[name]
            grad = named[name].grad
            assert grad is not None
            buffer[name] = beta * buffer[name] + (1 - beta) * grad.double().numpy()
            right = exact[name].T @ vector[name]
            left = exact[name] @ (right / np.linalg.norm(right))
            sigma[name] = np.linalg.norm(left)
            vector[name] = left / sigma[name]
        for name in factors:
            other = name.replace(".A.", ".B.") if ".A." in name else name.replace(".B.", ".A.")
            exact[name] = exact[name] - lr / (sigma[name] + sigma[other] + 1) * by_svd(buffer[name])
    for name in factors:
        np.testing.assert_allclose(named[name].detach().numpy(), exact[name], rtol=0, atol=2e-5)
        largest = np.linalg.svd(exact[name], compute_uv=False)[0]
        assert sigma[name] == pytest.approx(largest, rel=0.1), "the vector of the step before makes it exact"


def test_spectron_bounds_the_change_of_the_product() -> None:
    named = model()
    optimizer = make_optimizer(named, settings(name="spectron", weight_decay=0.0, momentum=0.0))
    set_lr(optimizer, 0.05)
    for step in range(20):
        before = named["h.1.proj.B.weight"].detach() @ named["h.1.proj.A.weight"].detach()
        stepped(optimizer, named, step)
    changed = named["h.1.proj.B.weight"].detach() @ named["h.1.proj.A.weight"].detach() - before
    # Newton-Schulz's singular values are below 1.3, which the paper's bound takes as 1.
    assert 0.01 < float(torch.linalg.matrix_norm(changed, 2)) < 1.3 * 0.05


def projected(a: np.ndarray, b: np.ndarray, grad_a: np.ndarray, grad_b: np.ndarray) -> np.ndarray:
    """The gradient of W = B A in the tangent space, from those of A and B, by normal equations instead of QR."""
    onto = b @ np.linalg.inv(b.T @ b)
    right = grad_b @ np.linalg.inv(a @ a.T) @ a
    return np.asarray(onto @ grad_a + right - onto @ (b.T @ right))


def best_of_rank(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(w)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


@pytest.mark.parametrize(("out", "rank", "into"), [(9, 3, 14), (5, 3, 5), (4, 4, 7)])
def test_loros_exact_step_is_the_best_matrix_of_its_rank(out: int, rank: int, into: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(rank, into).double(), torch.randn(out, rank).double()
    g = torch.randn(out, into).double()
    new_a, new_b = (new.numpy() for new in exact_step(a, b, b.T @ g, g @ a.T, 0.1))
    (u, _, _), (_, _, v) = (np.linalg.svd(m.numpy(), full_matrices=False) for m in (b, a))
    onto_u, onto_v = u @ u.T, v.T @ v
    tangent = onto_u @ g.numpy() + g.numpy() @ onto_v - onto_u @ g.numpy() @ onto_v
    np.testing.assert_allclose(projected(*(m.numpy() for m in (a, b, b.T @ g, g @ a.T))), tangent, atol=1e-9)
    np.testing.assert_allclose(new_b @ new_a, best_of_rank((b @ a).numpy() - 0.1 * tangent, rank), atol=1e-9)
    np.testing.assert_allclose(new_b.T @ new_b, new_a @ new_a.T, atol=1e-9)


def test_loro_takes_an_exact_step_with_adamws_directions_and_begins_again() -> None:
    named, same = model(), model()
    how = {"rates": "loro", "weight_decay": 0.0, "eps": 1e-8}
    optimizer = make_optimizer(named, settings(name="loro", restart_every=3, **how))
    plain = make_optimizer(same, settings(**how))
    for step in range(2):
        for each, of in ((optimizer, named), (plain, same)):
            set_lr(each, 1e-2)
            stepped(each, of, step)
    assert all(torch.equal(named[name], p) for name, p in same.items()), "AdamW's steps until the third"
    layer = "h.1.proj"
    before = [same[f"{layer}.{factor}.weight"].detach().double().numpy() for factor in "AB"]
    stepped(optimizer, named, 2)
    stepped(plain, same, 2)
    directions = []
    for factor in "AB":
        kept = plain.state[same[f"{layer}.{factor}.weight"]]
        mean, square = (kept[name].double().numpy() for name in ("exp_avg", "exp_avg_sq"))
        directions.append(mean / (1 - 0.9**3) / (np.sqrt(square / (1 - 0.95**3)) + 1e-8))
    w = before[1] @ before[0] - 1e-2 * projected(*before, *directions)
    found = (named[f"{layer}.B.weight"] @ named[f"{layer}.A.weight"]).detach().numpy()
    np.testing.assert_allclose(found, best_of_rank(w, 48), atol=2e-4)
    assert torch.equal(named["wte.weight"], same["wte.weight"]), "other parameters take AdamW's step"
    for parameter in named.values():
        assert all(not value.any() for value in moments(optimizer, parameter).values())


def test_apollo_scales_the_gradient_by_the_step_of_a_projection() -> None:
    named, lr, decay = model(), 1e-2, 0.1
    name = "h.1.proj.A.weight"  # (48, 96): projected over its rows
    optimizer = make_optimizer(named, settings(name="apollo_mini", weight_decay=decay))
    set_lr(optimizer, lr)
    w, m, v, last = named[name].detach().double().numpy(), np.zeros(96), np.zeros(96), 0.0
    random = torch.randn(48, generator=generator_of(0, f"{name}.apollo")).double().numpy()
    for step in range(1, 5):
        stepped(optimizer, named, step)
        grad = named[name].grad
        assert grad is not None
        g = grad.double().numpy()
        r = random @ g
        m, v = 0.9 * m + 0.1 * r, 0.95 * v + 0.05 * r**2
        scaled = g * np.linalg.norm(m / (np.sqrt(v) + 1e-8)) / (np.linalg.norm(r) + 1e-8)
        if last:
            scaled /= max(np.linalg.norm(scaled) / (last + 1e-8), 1.01) / 1.01
        last = float(np.linalg.norm(scaled))
        size = lr * np.sqrt(1 - 0.95**step) / (1 - 0.9**step)
        w = (w - size * np.sqrt(128) * scaled) * (1 - lr * decay)
    np.testing.assert_allclose(named[name].detach().numpy(), w, rtol=0, atol=1e-4)
    kept = moments(optimizer, named[name])
    assert {key: tuple(value.shape) for key, value in kept.items()} == {
        "exp_avg": (96,),
        "exp_avg_sq": (96,),
        "scaled_norm": (),
    }


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_begins_at_zero_learns(name: str) -> None:
    """B is 0, so A has no gradient in the first step."""
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(4, 12)), nn.Parameter(torch.zeros(8, 4))
    target = torch.randn(8, 12)
    optimizer = make_optimizer(
        {"model.layers.0.q_proj.A": a, "model.layers.0.q_proj.B": b}, settings(name=name, lr=0.05)
    )
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (b @ a - target).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss))
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.isfinite(p).all() for p in (a, b))


@pytest.mark.parametrize("name", ["muon", "spectron", "loro"])
def test_three_pairs_in_one_layer_learn_as_three_layers(name: str) -> None:
    """Queries, keys and values apart: A (3 rank, in), B (3 out, rank)."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, 10), torch.randn(3, 4, 2)
    together = {"h.0.c_attn.A.weight": a.flatten(0, 1), "h.0.c_attn.B.weight": b.flatten(0, 1)}
    alone = {f"h.0.{i}.{f}.weight": t[i] for i in range(3) for f, t in (("A", a), ("B", b))}
    fused, apart = ({key: nn.Parameter(value.clone()) for key, value in some.items()} for some in (together, alone))
    given = settings(name=name, restart_every=2, rates="plain" if name == "spectron" else "mup")
    ours, theirs = make_optimizer(fused, given), make_optimizer(apart, given)
    for _ in range(3):
        grads = torch.randn(3, 2, 10), torch.randn(3, 4, 2)
        for factor, grad in zip("AB", grads, strict=True):
            fused[f"h.0.c_attn.{factor}.weight"].grad = grad.flatten(0, 1)
            for i in range(3):
                apart[f"h.0.{i}.{factor}.weight"].grad = grad[i].clone()
        for each in (ours, theirs):
            set_lr(each, 1e-2)
            each.step()
    if name == "spectron":  # each vector of a power iteration begins with its length, in which they differ
        assert len(moments(ours, fused["h.0.c_attn.B.weight"])["power_vector"]) == 12
    for factor in "AB":
        whole = torch.cat([apart[f"h.0.{i}.{factor}.weight"] for i in range(3)])
        torch.testing.assert_close(fused[f"h.0.c_attn.{factor}.weight"], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "count"),
    [((4, 12), (8, 4), 1), ((12, 12), (9, 4), 3), ((300, 4), (8, 4), 0), ((4, 4), (8, 4), 1), ((4, 4), (4, 4), 1)],
)
def test_the_pairs_of_a_layer_are_counted_by_shape(a: Any, b: Any, count: int) -> None:
    """One pair, three, an embedding's (tokens, rank), and an adapter of a factor as narrow as itself."""
    assert blocks_of(a, b) == count


@pytest.mark.parametrize("name", NAMES)
def test_moments_put_back_go_on_bit_equal(name: str) -> None:
    """LORO's begin again after step 2 and step 4."""
    whole, given = model(), settings(name=name, restart_every=2)
    optimizer = make_optimizer(whole, given)
    for step in range(3):
        stepped(optimizer, whole, step)
    held = {key: {n: value.clone() for n, value in moments(optimizer, p).items()} for key, p in whole.items()}
    assert all(held.values())
    again = {key: nn.Parameter(p.detach().clone()) for key, p in whole.items()}
    other = make_optimizer(again, given)
    init_state(other, 3)
    for key, parameter in again.items():
        targets = moments(other, parameter)
        assert targets.keys() == held[key].keys()
        for kept, value in held[key].items():
            targets[kept].copy_(value)
    for step in range(3, 6):
        stepped(optimizer, whole, step)
        stepped(other, again, step)
    assert all(torch.equal(again[key], p) for key, p in whole.items())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_forgotten_moves_no_more_and_changes_nothing_else(name: str) -> None:
    both, alone = model(), model()
    gone = ["wte.weight", "h.0.fc.weight"]
    optimizer = make_optimizer(both, settings(name=name))
    other = make_optimizer({key: p for key, p in alone.items() if key not in gone}, settings(name=name))
    for step in range(4):
        if step == 2:
            drop_parameters(optimizer, [both[key] for key in gone])
            still = {key: both[key].detach().clone() for key in gone}
        stepped(optimizer, both, step)
        stepped(other, alone, step)
    assert all(torch.equal(both[key], still[key]) for key in gone)
    assert all(torch.equal(both[key], p) for key, p in alone.items() if key not in gone)
    assert {id(p) for p in optimizer.state} == {id(p) for key, p in both.items() if key not in gone}


@pytest.mark.parametrize("name", NAMES)
def test_the_counted_state_is_the_real_one(name: str) -> None:
    named = model()
    given = settings(name=name, rank=1)
    optimizer = make_optimizer(named, given)
    stepped(optimizer, named, 0)
    real = sum(value.nbytes for p in named.values() for value in moments(optimizer, p).values())
    assert state_bytes(((key, tuple(p.shape)) for key, p in named.items()), given) == real
    everything = [v for p in named.values() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)]
    shared = sum(value.numel() for value in everything) - sum(
        value.numel() for p in named.values() for value in moments(optimizer, p).values()
    )
    assert shared <= len(named) * (512 if name == "adamw8bit" else 1), "nothing else is kept but steps and codes"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "apollo_mini"])
def test_the_counted_products_are_the_real_ones(name: str) -> None:
    """torch counts products of two matrices, and not APOLLO's with vectors.

    By hand for Muon: five times two products of n^2 m, and one of n^3, for each matrix (n, m) with n <= m.
    """
    named = model()
    given = settings(name=name, rank=3, dense_cycles=0)
    optimizer = make_optimizer(named, given)
    with FlopCounterMode(display=False) as counter:
        stepped(optimizer, named, 0)
    shapes = {key: tuple(p.shape) for key, p in named.items()}
    assert product_operations([shapes], given) == counter.get_total_flops()
    if name == "muon":
        sides = [(4, 10), *[(6, 6)] * 3, (4, 12), (4, 8), (48, 96), (48, 80)]
        assert counter.get_total_flops() == 2 * sum(5 * (2 * n**2 * m + n**3) for n, m in sides)


def test_an_optimizer_without_a_rule_for_any_weight_is_refused() -> None:
    dense = {"wte.weight": (30, 8), "h.0.fc.weight": (8, 8), "h.0.fc.bias": (8,)}
    check_taken(settings(name="muon"), dense)
    with pytest.raises(ConfigError) as caught:
        check_taken(settings(name="spectron"), dense)
    said = "optimizer.name=spectron updates A and B of pairs in transformer blocks, and this model trains none; use one"
    assert said in str(caught.value)
    assert "adamw" in str(caught.value)
    assert "muon" in str(caught.value)
    with pytest.raises(ConfigError, match=r"optimizer\.name=muon updates matrices in transformer blocks"):
        check_taken(settings(name="muon"), {"lm_head.A": (2, 8), "lm_head.B": (30, 2), "h.0.norm.weight": (8,)})


def test_settings_that_do_nothing_with_an_optimizer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.rates=mup does not work with optimizer\.name=spectron, whose"):
        check_optimizer(settings(name="spectron", rates="mup"))
    check_optimizer(settings(name="muon", rates="mup", lr_adamw=1e-3))


@pytest.mark.parametrize(
    ("values", "unused"),
    [
        ({"momentum": 0.9}, ["momentum"]),
        ({"name": "loro", "momentum": 0.9, "rank": 8}, ["momentum", "rank"]),
        ({"name": "muon", "momentum": 0.9, "dense_cycles": 2, "restart_every": 7}, ["dense_cycles", "restart_every"]),
        ({"schedule": "restarts", "restart_every": 70, "cooldown_share": 0.5}, ["cooldown_share"]),
        ({"name": "relora", "rank": 8, "restart_every": 70, "restart_warmup_steps": 7}, ["restart_warmup_steps"]),
        ({"schedule": "wsd", "cooldown_share": 0.5}, []),
    ],
)
def test_settings_of_other_optimizers_and_schedules_are_refused(values: dict[str, Any], unused: list[str]) -> None:
    if not unused:
        check_optimizer(settings(**values))
        return
    with pytest.raises(ConfigError) as caught:
        check_optimizer(settings(**values))
    assert [problem.split("=")[0] for problem in caught.value.problems] == [f"optimizer.{name}" for name in unused]
    assert f"optimizer.schedule={values.get('schedule', 'cosine')}; leave {unused[0]} out." in str(caught.value)
