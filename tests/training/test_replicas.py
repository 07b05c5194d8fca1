"""Replicas: gradients averaged during the last backward pass, and the optimizer's state divided and put together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.registry import make_config, resolve_shape, skeleton
from finhpc.models.initialize import random_fill
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Optimizer, Parallel
from finhpc.training.batches import TokenBatches
from finhpc.training.journal import read
from finhpc.training.optimizers.kind import layer_of
from finhpc.training.optimizers.stage import elementwise, moments
from finhpc.training.workers import replicas
from finhpc.training.workers.replicas import GradientAverager, divide
from tests.training.processes import run_processes
from tests.training.test_blend import EIGHT_BIT, RELORA, TRAINABLE, checkpoint, losses
from tests.training.test_blend import settings as blend_settings
from tests.training.test_engine import SEQ, VOCAB, hf_config

STEPS, SAMPLES, MICRO_BATCHES = 10, 16, 2
PRODUCT: dict[str, Any] = {"kind": "low_rank", "optimizer": {"decay": "product", "weight_decay": 5.0}}
OTHERS: dict[str, dict[str, Any]] = {
    "muon": {"kind": "dense", "optimizer": {"name": "muon", "lr_adamw": 1e-3}},
    "spectron": {"kind": "low_rank", "optimizer": {"name": "spectron", "lr": 0.05}},
    "loro": {"kind": "low_rank", "optimizer": {"name": "loro", "rates": "loro", "restart_every": 3}},
    "apollo": {"kind": "dense", "optimizer": {"name": "apollo_mini"}},
    "relora": RELORA,
}
KINDS = {"trainable": TRAINABLE, "eight": EIGHT_BIT, "product": PRODUCT, **OTHERS}


def settings(kind: str, count: int, sharded: bool) -> PretrainConfig:
    tree = blend_settings(**KINDS[kind]).model_dump()
    tree["parallel"] |= {
        "replicas": count,
        "shard_optimizer": sharded,
        "micro_batches": MICRO_BATCHES,
        "micro_batch_size": SAMPLES // MICRO_BATCHES // count,
    }
    tree["train"] |= {"checkpoint_every": 1, "eval_every": 5}
    return build(PretrainConfig, tree)


def stream(count: int, first_step: int, replica: int) -> Iterator[dict[str, Any]]:
    """Micro-batch i of a step has the same samples over all replicas, however many there are."""
    each = SAMPLES // MICRO_BATCHES // count
    for step in range(first_step, STEPS):
        batch = torch.randint(0, VOCAB, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(step)).numpy()
        for i in range(MICRO_BATCHES):
            begin = i * SAMPLES // MICRO_BATCHES + replica * each
            places = np.arange(begin, begin + each)
            yield {"tokens": batch[places], "sample": places, "position": SAMPLES * step + places}


def train(folder: Path, config: PretrainConfig, stop: int) -> dict[str, int]:
    """Train as a worker does, and return after step `stop`: bytes of this replica's moments, and its parameters."""
    from finhpc.training.trainer import Trainer

    class Stopped(Exception):
        pass

    class Stopping(Trainer):
        def _step(self, step: int) -> None:
            if step > stop:
                self.checkpointer.wait()
                dist.barrier()
                raise Stopped
            super()._step(step)

    folder.mkdir(exist_ok=True)
    hf = hf_config(config)
    held_out = torch.randint(0, VOCAB, (8, SEQ), generator=torch.Generator().manual_seed(99)).numpy()
    worker = Stopping(
        config=config,
        hf_config=hf,
        fill=random_fill(hf, config.train.seed, config.method.init),
        device=torch.device("cpu"),
        folder=folder,
        source=TokenBatches(config.parallel, partial(stream, config.parallel.replicas), held_out),
    )
    try:
        worker.run()
    except Stopped:
        assert stop < STEPS
    engine = worker.engine
    state = [value for p in engine.updated.values() for value in moments(engine.optimizer, p).values()]
    parameters = sum(p.numel() for p in engine.trained_parameters().values())
    return {"bytes": sum(value.untyped_storage().nbytes() for value in state), "parameters": parameters}


def runs(folder: Path, work: list[tuple[str, PretrainConfig, int]]) -> dict[str, dict[str, int]]:
    return {name: train(folder / name, config, stop) for name, config, stop in work}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, dict[str, int]]]]]:
    """Runs over two replicas, whole, divided, and now this, now that; and runs that go from 4 or 2 replicas to 1."""
    folder = tmp_path_factory.mktemp("replicas")
    found = {}
    for count, stop in ((4, 3), (2, 7), (1, STEPS)):
        moved = ("trainable", "eight", "spectron") if count < 4 else ("trainable",)
        work = [(f"{kind}-moved", settings(kind, count, count > 1), stop) for kind in moved]
        if count == 2:
            for kind in KINDS:
                whole, divided = settings(kind, 2, False), settings(kind, 2, True)
                work.append((f"{kind}-whole", whole, STEPS))
                mixed = ((divided, 4), (whole, 8), (divided, STEPS))
                work += [(f"{kind}-mixed", *way) for way in mixed if kind != "product"]
            work.append(("product-divided", settings("product", 2, True), STEPS))
        found[count] = run_processes(runs, count, folder, work)
    return folder, found


@pytest.mark.parametrize(
    ("kind", "way", "starts"),
    [(kind, "mixed", [0, 4, 8]) for kind in KINDS if kind != "product"] + [("product", "divided", [0])],
)
def test_divided_state_trains_and_resumes_bit_equal(kind: str, way: str, starts: list[int], trained: Any) -> None:
    folder, _ = trained
    whole, other = folder / f"{kind}-whole", folder / f"{kind}-{way}"
    assert losses(other) == losses(whole)
    ours, theirs = together(other), together(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert [record["step"] for record in read(other / "journal.jsonl")[0] if record["kind"] == "start"] == starts


def together(folder: Path) -> dict[str, Tensor]:
    """The last checkpoint's tensors; rows of one tensor are put together."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for key, value in checkpoint(folder, STEPS).items():
        name, _, rows = key.partition("[")
        parts.setdefault(name, []).append((int(rows.partition(":")[0] or 0), value))
    ordered = {name: [v for _, v in sorted(found, key=lambda part: part[0])] for name, found in parts.items()}
    return {name: found[0] if len(found) == 1 else torch.cat(found) for name, found in ordered.items()}


@pytest.mark.parametrize(("kind", "tolerance"), [("trainable", 2e-5), ("eight", 1e-3), ("spectron", 2e-5)])
def test_other_numbers_of_replicas_go_on_with_it(kind: str, tolerance: float, trained: Any) -> None:
    folder, _ = trained
    moved, whole = losses(folder / f"{kind}-moved"), losses(folder / f"{kind}-whole")
    for what in ("train", "norm", "eval"):
        assert moved[what] == pytest.approx(whole[what], rel=tolerance), what


def test_each_replica_has_its_share_of_the_state_in_memory_and_on_disk(trained: Any) -> None:
    folder, found = trained
    for count, name in ((2, "product-divided"), (4, "trainable-moved")):
        for rank in found[count]:
            share = 8 * rank[name]["parameters"] / count
            assert rank[name]["bytes"] == pytest.approx(share, rel=0.05), name
    for rank in found[2]:
        assert rank["product-whole"]["bytes"] == 8 * rank["product-whole"]["parameters"]
    for name in ("product-whole", "product-divided"):
        files = sorted((folder / name / "checkpoints" / f"step_{STEPS:08d}").glob("stage-*"))
        assert [file.name for file in files] == [f"stage-00000-replica-0000{i}.safetensors" for i in range(2)]
        sizes = [file.stat().st_size for file in files]
        assert max(sizes) < 1.1 * min(sizes), "each replica writes its share"


@pytest.mark.parametrize("method", [{"kind": "dense"}, {"rank": 192}])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_share_of_a_large_model_is_even(method: dict[str, Any], count: int) -> None:
    config = build(PretrainConfig, {"model": {"preset": "gpt2-127m"}, "method": method})
    shape = make_config(resolve_shape(config.model), ranks_of(config.method), config.method.kind)
    named = dict(skeleton(shape).named_parameters())
    total = sum(parameter.numel() for parameter in named.values())
    seen: dict[str, int] = dict.fromkeys(named, 0)
    for share in divide(named, count, by_rows=set(named)):
        own = {name: len(named[name]) if rows is None else rows.stop - rows.start for name, rows in share.items()}
        numbers = sum(named[name].numel() // len(named[name]) * rows for name, rows in own.items())
        assert numbers == pytest.approx(total / count, rel=0.01)
        for name, rows in own.items():
            seen[name] += rows
    assert seen == {name: len(parameter) for name, parameter in named.items()}, "every row has one owner"
    for share in divide(named, count, by_rows=set()):
        assert set(share.values()) == {None}, "whole tensors"
    assert sum(len(share) for share in divide(named, count, by_rows=set())) == len(named)


def test_whole_tensors_and_rows_even_the_shares_out() -> None:
    """Muon's matrices are whole, with A and B of a layer together; AdamW's embedding fills the shares up."""
    config = build(PretrainConfig, {"model": {"preset": "gpt2-127m"}, "method": {"rank": 192}})
    shape = make_config(resolve_shape(config.model), ranks_of(config.method), config.method.kind)
    named = dict(skeleton(shape).named_parameters())
    by_rows = elementwise({name: tuple(p.shape) for name, p in named.items()}, Optimizer(name="muon"))
    assert {"transformer.wte.weight", "lm_head.A.weight", "transformer.ln_f.bias"} < by_rows
    total = sum(parameter.numel() for parameter in named.values())
    for count in (2, 3, 8):
        shares, owners = divide(named, count, by_rows, layer_of), dict[str, set[int]]()
        for replica, share in enumerate(shares):
            for name in share.keys() - by_rows:
                owners.setdefault(layer_of(name), set()).add(replica)
                assert share[name] is None
            own = sum(named[n].numel() if r is None else named[n][r].numel() for n, r in share.items())
            assert own == pytest.approx(total / count, rel=0.01)
        assert all(len(replicas) == 1 for replicas in owners.values())
    few = {"h.0.a": torch.empty(100, 10), "h.0.b": torch.empty(10, 10), "wte": torch.empty(64, 10)}
    first, second = divide(few, 2, {"wte"})
    assert (first, second) == ({"h.0.a": None}, {"h.0.b": None, "wte": None}), "nothing is added to more than the mean"


def averaged() -> dict[str, Any]:
    """In each of two processes: gradients of three steps, and which buckets were on their way before the end."""
    replicas.BUCKET_BYTES = 4 * 40  # two layers
    rank = dist.get_rank()
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)], nn.Linear(4, 4))
    with torch.no_grad():
        for i, parameter in enumerate(layers.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    alone = nn.Parameter(torch.ones(3))  # with a gradient on one replica, in one step
    tied = layers[0].weight
    group = dist.group.WORLD
    averager = GradientAverager([*layers.parameters(), alone], group, late=[tied])
    out: dict[str, Any] = {"sent": [], "alone": []}
    for step in range(3):
        for parameter in (*layers.parameters(), alone):
            parameter.grad = None
        for micro_batch in range(3):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank))
            loss = layers(x).square().mean()
            if rank == 0 and micro_batch == 0:
                loss = loss + alone.sum()
            loss.backward()
            if micro_batch < 2:
                assert not averager._works
        out["sent"].append(len(averager._works))
        tied.grad += 1.0  # type: ignore[operator] # the other stage's share
        averager.finish()
        out["alone"].append(alone.grad.tolist())  # type: ignore[union-attr]
        out[f"grads{step}"] = [p.grad.clone() for p in layers.parameters()]
    averager.close()
    out["buckets"] = len(averager._buckets)
    # The mean without an averager, of the last step.
    plain = [torch.zeros_like(p) for p in layers.parameters()]
    for other in range(2):
        for micro_batch in range(3):
            layers.zero_grad()
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(200 + 10 * micro_batch + other))
            layers(x).square().mean().backward()
            for total, parameter in zip(plain, layers.parameters(), strict=True):
                total += parameter.grad / 2  # type: ignore[operator]
    plain[0] += 1.0
    out["close"] = [float((a - b).norm() / b.norm()) for a, b in zip(out["grads2"], plain, strict=True)]
    return out


def test_gradients_travel_while_the_last_pass_computes_others() -> None:
    first, second = run_processes(averaged, 2)
    # The parameter without a gradient on the second replica comes first in the order: it holds up the buckets there.
    assert first["sent"][0] == second["sent"][0] == 0
    assert first["sent"][1:] == [first["buckets"] - 1] * 2, "all but the tied one"
    for step in range(3):
        assert first["alone"][step] == second["alone"][step] == [0.5] * 3
        for a, b in zip(first[f"grads{step}"], second[f"grads{step}"], strict=True):
            assert torch.equal(a, b)
    assert max(first["close"]) < 1e-6


def added_once_more() -> str:
    weight = nn.Parameter(torch.ones(3))
    averager = GradientAverager([weight], dist.group.WORLD)
    weight.sum().backward()
    averager.finish()
    weight.sum().backward()
    try:
        weight.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_gradient_that_grows_after_it_was_sent_is_an_error() -> None:
    for message in run_processes(added_once_more, 2):
        assert "was added to 2 times in this step, and 1 times in the steps before" in message


def test_one_replica_has_nothing_to_divide() -> None:
    config = build(PretrainConfig, {"parallel": {"shard_optimizer": True}})
    (problem,) = config.problems()
    assert problem.startswith("parallel.shard_optimizer=true")
    assert "use 2 or more replicas" in problem
    assert Parallel(shard_optimizer=True, replicas=2).problems() == []
