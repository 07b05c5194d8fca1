"""Numerics: every topology against a plain torch loop over transformers' own model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from finhpc.lowrank.dlr import duplicates
from finhpc.lowrank.layers import LowRankLinear, split
from finhpc.models.families.registry import config_of_method, resolve_shape
from finhpc.models.initialize import initial_model
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from tests.rounding import plain_name, round_on_each_use
from tests.training.processes import run_processes

SAMPLES, SEQ, VOCAB = 16, 32, 211
ODD = 11  # held-out samples that fill no number of micro-batches
CASES = {
    "gpt2-untied-low-rank": {"model": {"preset": "gpt2-tiny"}, "method": {"kind": "low_rank", "rank": 8}},
    "gpt2-tied-dense": {"model": {"preset": "gpt2-tiny"}, "method": {"kind": "dense"}},
    "llama-low-rank-embedding": {
        "model": {"preset": "llama-tiny"},
        "method": {"kind": "low_rank", "rank": 8, "embedding": "low_rank"},
    },
    "gpt2-tied-separate-cola": {
        "model": {"preset": "gpt2-tiny"},
        "method": {"kind": "cola", "rank": 8, "ranks": {"up": 5}, "qkv": "separate", "head": "dense"},
    },
    "llama-sltrain": {
        "model": {"preset": "llama-tiny"},
        "method": {"kind": "sltrain", "rank": 8, "sparse_share": 0.1},
    },
}


def settings(case: str, stages: int, replicas: int, micro_batches: int, **train: Any) -> PretrainConfig:
    bits, schedule = train.pop("bits", 16), train.pop("schedule", "1f1b")
    tree: dict[str, Any] = {
        **CASES[case],
        "data": {"seq_len": SEQ},
        "optimizer": {"lr": 2e-3, "grad_clip": 0.1, "warmup_steps": 3} | train.pop("optimizer", {}),
        "parallel": {
            "stages": stages,
            "replicas": replicas,
            "schedule": schedule,
            "micro_batches": micro_batches,
            "micro_batch_size": SAMPLES // replicas // micro_batches,
            "shard_optimizer": train.pop("sharded", False),
        },
        "train": {"seed": 3, **train},
        "quantization": {"bits": bits, "when": "during" if bits < 16 else "after"},
    }
    tree["method"] = {**tree["method"], **tree["train"].pop("method", {})}
    tree["model"] = {**tree["model"], "vocab_size": VOCAB, "context": SEQ, "layers": 3, "width": 32, "heads": 4}
    if tree["model"]["preset"] == "llama-tiny":
        tree["model"] |= {"mlp_width": 48}
    return build(PretrainConfig, tree)


def hf_config(config: PretrainConfig) -> Any:
    return config_of_method(resolve_shape(config.model), config.method)


def tokens(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(step))


def lr_at(config: PretrainConfig, step: int) -> float:
    from finhpc.training.optimizers.schedules import learning_rate

    return learning_rate(config.optimizer, step, 20)


@cache
def plain_loop(case: str, steps: int, **train: Any) -> dict[str, Any]:
    """transformers' model, one process, whole batch at once, torch's clipping and AdamW."""
    config = settings(case, 1, 1, 1, **train)
    torch.set_num_threads(1)
    model = initial_model(hf_config(config), config.train.seed, config.method.init)
    model.config._attn_implementation = "sdpa"  # torch's own attention, not ours
    model.train()
    if config.quantization.training_bits < 16:
        round_on_each_use(model, config.quantization.training_bits)
    if config.method.init == "dlr":
        residuals_outside(model)
    matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 or name.endswith(".S")]
    vectors = [p for name, p in model.named_parameters() if p.dim() < 2 and not name.endswith(".S")]
    decay = config.optimizer.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=config.optimizer.eps)
    out: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(1, steps + 1):
        batch = tokens(step)
        if config.train.precision == "bf16-weights":
            half = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
            loss = torch.func.functional_call(model, half, (batch,), {"labels": batch}).loss
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
                loss = model(batch, labels=batch).loss
        loss.backward()
        if step == 1:
            out["raw"] = {plain_name(n): p.grad.clone() for n, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip or float("inf"))
        if step == 1:
            out["clipped"] = {plain_name(n): p.grad.clone() for n, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = lr_at(config, step)
        optimizer.step()
        optimizer.zero_grad()
        out["losses"].append(loss.item())
        out["norms"].append(norm.item())
    with torch.no_grad():
        model.eval()
        out["eval"] = model(tokens(99), labels=tokens(99)).loss.item()
        out["odd"] = model(tokens(98)[:ODD], labels=tokens(98)[:ODD]).loss.item()
        for module in list(model.modules()):  # DLR's fold
            if config.method.init == "dlr" and parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight")
    out["weights"] = {plain_name(n): p.detach().clone() for n, p in model.named_parameters()}
    return out


class Residual(nn.Module):
    """DLR as in its paper: what is trained is B, and the layer computes with B + R / sqrt(K)."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.register_buffer("residual", residual)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.residual

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight - self.residual


def residuals_outside(model: nn.Module) -> None:
    """Take the residual out of every B in the blocks, and add it on each use."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LowRankLinear) and name != "lm_head":
            residual = torch.zeros_like(layer.B.weight)
            for block in split(residual, layer.blocks):
                columns, scale = duplicates(len(block), layer.rank)
                block[torch.arange(len(block)), columns] = scale
            parametrize.register_parametrization(layer.B, "weight", Residual(residual))


def engine_runs(
    runs: list[tuple[str, int, int, int, dict[str, Any]]], steps: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """In one process of the group: each run's losses, norms, this stage's gradients and weights."""
    from finhpc.training.batches import TokenBatches
    from finhpc.training.engine import Engine
    from finhpc.training.held_out import held_out_loss

    class Recorder(Engine):
        """Keeps the gradients of the first step, before and after clipping."""

        def _before_step(self, *args: Any) -> None:
            named = self.named_parameters()
            if self.step == 0:
                self.raw = {name: named[name].grad.to("cpu", copy=True) for name in self.owned_names()}
            super()._before_step(*args)
            if self.step == 0:
                self.clipped = {name: named[name].grad.to("cpu", copy=True) for name in self.owned_names()}

    results = []
    for case, stages, replicas, micro_batches, train in runs:
        config = settings(case, stages, replicas, micro_batches, **train)
        engine = Recorder(config, hf_config(config), torch.device(device))
        out: dict[str, Any] = {"losses": [], "norms": []}
        per_replica = SAMPLES // replicas
        size = config.parallel.micro_batch_size

        def batches(batch: Tensor, engine: Any = engine, n: int = per_replica, size: int = size) -> Any:
            return iter(batch[engine.replica * n : (engine.replica + 1) * n].split(size))

        for step in range(1, steps + 1):
            out["losses"].append(engine.train_step(batches(tokens(step)), lr_at(config, step)))
            out["norms"].append(engine.grad_norm)
        out["eval"] = engine.evaluate(list(batches(tokens(99))))
        feed = TokenBatches(config.parallel, lambda step, replica: iter(()), tokens(98)[:ODD].numpy())
        out["odd"] = held_out_loss(engine, feed)
        out |= {"raw": engine.raw, "clipped": engine.clipped}
        named = engine.named_parameters()
        out["weights"] = {name: named[name].detach().to("cpu", copy=True) for name in engine.owned_names()}
        results.append(out)
    return results


def merged(results: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    return {name: value for result in results for name, value in result[key].items()}


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor], relative: float, what: str) -> None:
    assert ours.keys() == plain.keys()
    # A floor: some gradients (GPT-2's key bias) are zero but for rounding.
    floor = 1e-3 * max(float(value.norm()) for value in plain.values())
    for name, value in plain.items():
        difference = float((ours[name] - value).norm()) / max(float(value.norm()), floor)
        assert difference <= relative, f"{what}: {name} differs by {difference:.2e}"


STEPS = 10
WEIGHTS = 2e-3  # relative: AdamW moves the keys' bias, whose gradient is zero, by the signs of rounding errors
RUNS = [(case, micro_batches) for case in CASES for micro_batches in ((1, 8) if case == "gpt2-tied-dense" else (4,))]
TOPOLOGIES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), pytest.param(3, 2, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("stages", "replicas"), TOPOLOGIES)
def test_every_topology_equals_the_plain_loop_in_float32(stages: int, replicas: int) -> None:
    ways: list[dict[str, Any]] = [{}, {"sharded": True}] if replicas > 1 else [{}]
    compare_with_plain_loop(stages, replicas, [(case, number, way) for case, number in RUNS for way in ways])


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (2, 2), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_dualpipev_equals_the_plain_loop_in_float32(stages: int, replicas: int) -> None:
    """`odd` has fewer held-out micro-batches than the schedule needs."""
    dual = {"schedule": "dualpipev"}
    runs = [(case, micro_batches, dual) for case in CASES for micro_batches in (4, 8) if micro_batches >= 2 * stages]
    runs.append(("llama-low-rank-embedding", 8, dual | {"recompute": "attention"}))
    if replicas > 1:
        runs += [("gpt2-tied-dense", 8, way) for way in (dual, dual | {"sharded": True})]
    compare_with_plain_loop(stages, replicas, runs)


def compare_with_plain_loop(stages: int, replicas: int, cases: list[tuple[str, int, dict[str, Any]]]) -> None:
    """Each case with its micro-batches and settings."""
    runs: list[Any] = [(case, stages, replicas, micro_batches, train) for case, micro_batches, train in cases]
    by_rank = run_processes(engine_runs, stages * replicas, runs, STEPS)
    for i, (case, *_, micro_batches, way) in enumerate(runs):
        plain = plain_loop(case, STEPS)
        assert max(plain["norms"]) > 0.1, "clipping must be active"
        results = [rank[i] for rank in by_rank]
        label = f"{case}, {stages} stages, {replicas} replicas, {micro_batches} micro-batches, {way}"
        for result in results:
            assert result["losses"] == pytest.approx(plain["losses"], rel=1e-5), label
            assert result["norms"] == pytest.approx(plain["norms"], rel=1e-5), label
            assert result["eval"] == pytest.approx(plain["eval"], rel=1e-5), label
            assert result["odd"] == pytest.approx(plain["odd"], rel=1e-5), f"every held-out sample counts: {label}"
        assert_same(merged(results, "raw"), plain["raw"], 1e-5, f"raw gradients, {label}")
        assert_same(merged(results, "clipped"), plain["clipped"], 1e-5, f"clipped gradients, {label}")
        assert_same(merged(results, "weights"), plain["weights"], WEIGHTS, f"weights, {label}")
        if way.get("sharded"):
            whole = [rank[i - 1] for rank in by_rank]
            assert [result["losses"] for result in results] == [result["losses"] for result in whole], label
            assert_same(merged(results, "weights"), merged(whole, "weights"), 0, f"bit-equal weights, {label}")


CHANGES = {"decay": "factors", "rates": "plain"}  # each must change the losses


def test_what_helps_low_rank_training_is_the_same_over_stages() -> None:
    helped = {
        "method": {"kind": "cola", "init": "normal"},
        "optimizer": {"decay": "product", "weight_decay": 5.0, "rates": "mup"},
    }
    case = "llama-low-rank-embedding"
    others = [helped | {"optimizer": helped["optimizer"] | {what: value}} for what, value in CHANGES.items()]
    [[one, *changed]] = run_processes(engine_runs, 1, [(case, 1, 1, 4, train) for train in (helped, *others)], 20)
    by_rank = run_processes(engine_runs, 2, [(case, 2, 1, 4, helped)], 20)
    for [rank] in by_rank:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert_same(merged([rank for [rank] in by_rank], "weights"), one["weights"], 1e-3, "weights")
    for what, run in zip(CHANGES, changed, strict=True):
        assert run["losses"] != pytest.approx(one["losses"], rel=1e-4), f"{what} does nothing"


OPTIMIZERS: dict[str, tuple[str, dict[str, Any], float]] = {  # optimizer -> case, its settings, tolerance
    "muon": ("gpt2-tied-dense", {"lr_adamw": 1e-3}, 1e-3),  # torch iterates in bfloat16
    "spectron": ("gpt2-untied-low-rank", {"lr": 0.05}, 1e-5),
    "loro": ("gpt2-untied-low-rank", {"rates": "loro", "restart_every": 3}, 1e-4),
    "apollo_mini": ("llama-low-rank-embedding", {}, 1e-5),
    "relora": ("gpt2-tied-dense", {"rank": 4, "restart_every": 2}, 1e-5),
}


def optimizer_run(name: str, stages: int, replicas: int, **way: Any) -> Any:
    case, values, _ = OPTIMIZERS[name]
    return case, stages, replicas, 2, {"optimizer": {"name": name, **values}, **way}


@cache
def optimizer_losses() -> dict[str, list[float]]:
    """Of each optimizer, and of AdamW in each case, in one process."""
    cases = sorted({case for case, _, _ in OPTIMIZERS.values()})
    runs = [*(optimizer_run(name, 1, 1) for name in OPTIMIZERS), *((case, 1, 1, 2, {}) for case in cases)]
    [found] = run_processes(engine_runs, 1, runs, STEPS)
    return {name: run["losses"] for name, run in zip([*OPTIMIZERS, *cases], found, strict=True)}


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (2, 2)])
def test_optimizers_are_the_same_over_stages_and_replicas(stages: int, replicas: int) -> None:
    ways: list[dict[str, Any]] = [{}, {"sharded": True}] if replicas > 1 else [{}]
    runs = [optimizer_run(name, stages, replicas, **way) for name in OPTIMIZERS for way in ways]
    for rank in run_processes(engine_runs, stages * replicas, runs, STEPS):
        for (case, *_, train), result in zip(runs, rank, strict=True):
            name = train["optimizer"]["name"]
            expected, tolerance = optimizer_losses()[name], OPTIMIZERS[name][2]
            assert result["losses"] == pytest.approx(expected, rel=tolerance), train
            assert result["losses"] != pytest.approx(optimizer_losses()[case], rel=tolerance), train


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 1), (1, 2)])
def test_dlr_trains_as_in_its_paper(stages: int, replicas: int) -> None:
    """With a decay that takes half of B in these steps, so that it matters where it pulls B to."""
    dlr: dict[str, Any] = {"method": {"init": "dlr"}, "optimizer": {"weight_decay": 50.0}}
    ways: list[dict[str, Any]] = [dlr] if replicas == 1 else [dlr, dlr | {"sharded": True}]
    case = "gpt2-tied-separate-cola"
    by_rank = run_processes(engine_runs, stages * replicas, [(case, stages, replicas, 4, way) for way in ways], STEPS)
    plain = plain_loop.__wrapped__(case, STEPS, **dlr)
    for i, way in enumerate(ways):
        results = [rank[i] for rank in by_rank]
        for result in results:
            assert result["losses"] == pytest.approx(plain["losses"], rel=1e-5), way
        assert_same(merged(results, "weights"), plain["weights"], WEIGHTS, f"weights, {way}")


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 2)])
def test_bf16_follows_the_plain_autocast_loop(stages: int, replicas: int) -> None:
    """Tolerance 0.5 % on each loss: bf16 keeps 8 bits, and sums are taken in another order."""
    precisions = ("bf16", "bf16-weights")
    runs: list[Any] = [(case, stages, replicas, 4, {"precision": kind}) for case in CASES for kind in precisions]
    by_rank = run_processes(engine_runs, stages * replicas, runs, STEPS)
    for i, (case, *_, train) in enumerate(runs):
        plain, exact = plain_loop(case, STEPS, **train), plain_loop(case, STEPS)
        results = [rank[i] for rank in by_rank]
        for result in results:
            assert result["losses"] == pytest.approx(plain["losses"], rel=5e-3), (case, train)
            assert result["losses"] != pytest.approx(exact["losses"], rel=1e-7), "bf16 must be in use"
        assert all(value.dtype == torch.float32 for value in merged(results, "raw").values())
        assert_same(merged(results, "raw"), plain["raw"], 0.2, f"raw gradients, {case}, {train}")


def test_rounded_weights_train_as_in_the_plain_loop() -> None:
    """The first step exactly; later ones loosely: a difference in the last bit may change a weight by a whole step."""
    runs: list[Any] = [(case, 2, 1, 4, {"bits": 4}) for case in CASES if "sltrain" not in case]
    runs.append(("gpt2-tied-dense", 2, 1, 4, {"bits": 8}))
    by_rank = run_processes(engine_runs, 2, runs, 4)
    for i, (case, *_, train) in enumerate(runs):
        plain, exact = plain_loop(case, 4, **train), plain_loop(case, 1)
        results = [rank[i] for rank in by_rank]
        label = f"{case}, {train}"
        for result in results:
            assert result["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-5), label
            assert result["losses"] == pytest.approx(plain["losses"], rel=2e-3), label
            assert result["losses"][0] != pytest.approx(exact["losses"][0], rel=1e-7), "weights must be rounded"
        assert_same(merged(results, "raw"), plain["raw"], 1e-5, f"raw gradients, {label}")


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    [(message, unchanged)] = run_processes(poisoned_step, 1)
    assert "at step 1" in message
    assert unchanged


def poisoned_step() -> tuple[str, bool]:
    from finhpc.errors import NonFiniteError
    from finhpc.training.engine import Engine

    config = settings("gpt2-untied-low-rank", 1, 1, 1)
    engine = Engine(config, hf_config(config), torch.device("cpu"))
    named = engine.named_parameters()
    with torch.no_grad():
        named["transformer.ln_f.weight"][0] = float("nan")
    before = {name: p.detach().clone() for name, p in named.items()}
    try:
        engine.train_step(iter([tokens(1)]), 1e-3)
    except NonFiniteError as error:
        same = [torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in named.items()]
        return str(error), all(same)
    return "no error", False
