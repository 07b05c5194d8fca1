"""Method 3 in training: any number of stages, stopped anywhere, and W gone for good."""

from __future__ import annotations

import gc
import math
import shutil
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.blend import alpha_at
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.families.registry import as_dense
from finhpc.models.initialize import initial_model, random_fill
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.batches import TokenBatches
from finhpc.training.journal import latest, read
from finhpc.training.memory import live_tensor_bytes
from tests.training.processes import run_processes
from tests.training.test_engine import SEQ, VOCAB, hf_config

STEPS, GONE = 10, 6  # W is gone from step 6 on
SIZE, BATCHES = 4, 2


def settings(stages: int = 1, preset: str = "gpt2-tiny", **changes: Any) -> PretrainConfig:
    """`changes`: of `method`, or of `train`, `quantization`, `optimizer`, `parallel` and `model` under their names."""
    tree: dict[str, Any] = {
        "model": {"preset": preset, "vocab_size": VOCAB, "context": SEQ, "layers": 3, "width": 32, "heads": 4},
        "data": {"seq_len": SEQ},
        "optimizer": {"lr": 2e-3, "warmup_steps": 2} | changes.pop("optimizer", {}),
        "parallel": {"stages": stages, "micro_batch_size": SIZE, "micro_batches": BATCHES}
        | changes.pop("parallel", {}),
        "train": {"steps": STEPS, "eval_every": 4, "checkpoint_every": 1, "keep_checkpoints": 99, "hang_timeout_s": 0}
        | changes.pop("train", {}),
        "quantization": changes.pop("quantization", {}),
    }
    tree["model"] |= changes.pop("model", {})
    tree["method"] = {"kind": "blend", "rank": 8, "blend_share": GONE / STEPS, **changes}
    if preset == "llama-tiny":
        tree["model"] |= {"mlp_width": 48}
    return build(PretrainConfig, tree)


def tokens(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (BATCHES, SIZE, SEQ), generator=torch.Generator().manual_seed(step))


def stream(first_step: int, replica: int, size: int = SIZE) -> Iterator[dict[str, Any]]:
    for step in range(first_step, STEPS):
        for i, batch in enumerate(tokens(step).numpy().reshape(-1, size, SEQ)):
            places = np.arange(size) + SIZE * BATCHES * step + size * i
            yield {"tokens": batch, "sample": places, "position": places}


class Stopped(Exception):
    pass


def train(folder: Path, config: PretrainConfig, stop: int = STEPS) -> None:
    """Train as a worker does, and stop before step `stop` + 1 as if killed there."""
    from finhpc.training.trainer import Trainer

    class Stopping(Trainer):
        def _step(self, step: int) -> None:
            if step > stop:
                self.checkpointer.wait()
                torch.distributed.barrier()
                raise Stopped
            super()._step(step)

    folder.mkdir(exist_ok=True)
    hf = hf_config(config)
    fill = random_fill(hf, config.train.seed, config.method.init)
    held_out = tokens(99).reshape(-1, SEQ).numpy()
    worker = Stopping(
        config=config,
        hf_config=hf,
        fill=fill,
        device=torch.device("cpu"),
        folder=folder,
        source=TokenBatches(config.parallel, partial(stream, size=config.parallel.micro_batch_size), held_out),
    )
    try:
        worker.run()
    except Stopped:
        assert stop < STEPS


def runs(folder: Path, work: list[tuple[str, PretrainConfig, tuple[int, ...]]]) -> None:
    """Each of `work`: a run's name, its settings, the steps after which it is stopped, each time after a new start."""
    for name, config, stops in work:
        if torch.distributed.get_rank() == 0 and (cut := folder / f"{name.partition('-')[0]}" / "stages.json").exists():
            (folder / name).mkdir(exist_ok=True)
            if not (folder / name / "stages.json").exists():
                shutil.copy2(cut, folder / name)  # bit-equal over the same cut alone
        torch.distributed.barrier()
        for stop in stops:
            train(folder / name, config, stop)


def losses(folder: Path) -> dict[str, dict[int, float]]:
    records, _ = read(folder / "journal.jsonl")
    train = latest(records, "train")
    return {
        "train": {step: record["train_loss"] for step, record in train.items()},
        "norm": {step: record["grad_norm"] for step, record in train.items()},
        "alpha": {step: record.get("alpha", 0.0) for step, record in train.items()},
        "eval": {step: record["val_loss"] for step, record in latest(records, "eval").items()},
    }


def checkpoint(folder: Path, step: int) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for file in (folder / "checkpoints" / f"step_{step:08d}").glob("stage-*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            held |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return held


TRAINABLE: dict[str, Any] = {"blend_weight": "trainable", "embedding": "low_rank", "preset": "llama-tiny"}
FROZEN: dict[str, Any] = {"blend_weight": "frozen"}
EIGHT_BIT: dict[str, Any] = {"kind": "dense", "optimizer": {"name": "adamw8bit"}}  # no method 3
SPECTRON: dict[str, Any] = {"kind": "low_rank", "optimizer": {"name": "spectron", "lr": 0.05}}
MUON: dict[str, Any] = {"blend_weight": "trainable", "optimizer": {"name": "muon"}}  # W is dropped from Muon's matrices
SLTRAIN: dict[str, Any] = {"kind": "sltrain", "sparse_share": 0.1, "qkv": "separate", "head": "dense"}
RELORA: dict[str, Any] = {"kind": "dense", "optimizer": {"name": "relora", "rank": 4, "restart_every": 3}}
KINDS = {"trainable": TRAINABLE, "frozen": FROZEN, "eight": EIGHT_BIT, "spectron": SPECTRON, "muon": MUON} | {
    "relora": RELORA,
    "sltrain": SLTRAIN,
}
MOVED = ("trainable", "eight", "spectron", "sltrain")
STOPS = (GONE - 1, 8, STEPS)  # steps after which a run is stopped and started again


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs over 1, 2 and 3 stages, the frozen one and Muon's over 1 and 2.

    Over 2 stages also stopped before and after W is gone; and three runs that go from 1 to 2 to 3 stages.
    """
    folder = tmp_path_factory.mktemp("blend")
    for stages, stop in ((1, 3), (2, 7), (3, STEPS)):
        kinds = {name: changes for name, changes in KINDS.items() if stages < 3 or name in MOVED}
        work = [(f"{name}{stages}", settings(stages, **changes), (STEPS,)) for name, changes in kinds.items()]
        if stages == 2:
            work += [(f"{name}2-stopped", settings(2, **changes), STOPS) for name, changes in KINDS.items()]
        work += [(f"{name}-moved", settings(stages, **KINDS[name]), (stop,)) for name in MOVED]
        run_processes(runs, stages, folder, work)
    return folder


@pytest.mark.parametrize("kind", ["trainable", "frozen"])
def test_every_number_of_stages_has_the_same_alpha_and_losses(kind: str, trained: Path) -> None:
    one = losses(trained / f"{kind}1")
    method = settings(**(TRAINABLE if kind == "trainable" else FROZEN)).method
    assert one["alpha"] == {step: alpha_at(method, step, STEPS) for step in range(1, STEPS + 1)}
    assert one["alpha"][GONE - 1] > 0 == one["alpha"][GONE]
    for stages in (2, 3) if kind == "trainable" else (2,):
        other = losses(trained / f"{kind}{stages}")
        assert other["alpha"] == one["alpha"]
        for what in ("train", "norm", "eval"):
            assert other[what] == pytest.approx(one[what], rel=2e-5), (what, stages)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_started_again_it_is_bit_equal(kind: str, trained: Path) -> None:
    whole, again = trained / f"{kind}2", trained / f"{kind}2-stopped"
    starts = [record["step"] for record in read(again / "journal.jsonl")[0] if record["kind"] == "start"]
    assert starts == [0, *STOPS[:-1]]
    assert losses(again) == losses(whole)
    ours, theirs = checkpoint(again, STEPS), checkpoint(whole, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_moments_of_8_bits_are_kept_over_any_number_of_stages(trained: Path) -> None:
    held = checkpoint(trained / "eight2", STEPS)
    names = {name.partition(".")[2] for name in held if name.startswith("absmax1.")}
    assert "transformer.h.0.mlp.c_fc.weight" in names
    assert {str(held[f"state1.{name}"].dtype) for name in names} == {"torch.uint8"}
    assert str(held["state2.transformer.h.0.ln_1.weight"].dtype) == "torch.float32"
    one, three = losses(trained / "eight1"), losses(trained / "eight3")
    assert three["train"] == pytest.approx(one["train"], rel=1e-3)
    assert losses(trained / "eight-moved")["train"] == pytest.approx(one["train"], rel=1e-3)


@pytest.mark.parametrize("kind", ["trainable", "spectron", "sltrain"])
def test_other_numbers_of_stages_go_on_with_it(kind: str, trained: Path) -> None:
    whole, moved = losses(trained / f"{kind}1"), losses(trained / f"{kind}-moved")
    assert moved["train"] == pytest.approx(whole["train"], rel=2e-5)


def test_w_is_in_checkpoints_as_long_as_it_is_trained_and_no_longer(trained: Path) -> None:
    def of_w(folder: str, step: int) -> set[str]:
        return {name.partition(".")[0] for name in checkpoint(trained / folder, step) if name.endswith(".W")}

    assert of_w("trainable2", GONE - 1) == {"param", "exp_avg", "exp_avg_sq"}
    assert of_w("trainable2", GONE) == of_w("frozen2", 1) == of_w("frozen2", GONE) == set()
    model = initial_model(hf_config(settings(preset="llama-tiny", embedding="low_rank")), 0, None)
    saved = {name[6:] for name in checkpoint(trained / "trainable2", STEPS) if name.startswith("param.")}
    assert saved == {name for name, _ in model.named_parameters()}


def test_dropping_w_is_said_and_keeps_the_other_moments(trained: Path) -> None:
    for kind, words in (("trainable", "the optimizer rebuilt without them; the others' moments stay"), ("frozen", ".")):
        records, _ = read(trained / f"{kind}2" / "journal.jsonl")
        said = [record["text"] for record in records if record["kind"] == "message"]
        line = next(text for text in said if "W is dropped" in text)
        assert line.startswith(f"step {GONE}: alpha is 0, so every W is dropped")
        assert line.endswith(words if kind == "frozen" else words + ".")


def dropped(changes: dict[str, Any]) -> dict[str, Any]:
    """In one process: the live bytes around the first step without W, and what is left of W."""
    from finhpc.training.engine import Engine

    config = settings(**changes)
    engine = Engine(config, hf_config(config), torch.device("cpu"))
    w = {name: parameter for name, parameter in engine.named_parameters().items() if name.endswith(".W")}
    out: dict[str, Any] = {"w_bytes": sum(parameter.nbytes for parameter in w.values())}
    optimised = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    out["optimised"] = sum(id(parameter) in optimised for parameter in w.values())
    left = [weakref.ref(parameter) for parameter in w.values()]
    w.clear()
    for step in range(1, GONE + 2):
        engine.train_step(iter(tokens(step)), 1e-3)
        if step in (GONE - 1, GONE + 1):
            gc.collect()
            out[f"bytes_{step}"] = live_tensor_bytes()
    out["left"] = sum(reference() is not None for reference in left)
    out["state"] = len(engine.optimizer.state) == len(engine.trained_parameters()) == len(engine.named_parameters())
    return out


def many(work: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dropped(changes) for changes in work]


def test_w_is_gone_from_memory() -> None:
    rounded = {"quantization": {"bits": 4, "when": "during"}}
    work = [FROZEN, TRAINABLE, TRAINABLE | rounded]
    for changes, found in zip(work, run_processes(many, 1, work)[0], strict=True):
        trainable = changes["blend_weight"] == "trainable"
        assert (found["optimised"] > 0) == trainable
        assert found["left"] == 0
        assert found["state"]
        copies = 3 if trainable else 1  # with two moments; its gradient is there during a step alone
        freed = found[f"bytes_{GONE - 1}"] - found[f"bytes_{GONE + 1}"]
        assert freed >= copies * found["w_bytes"] > 0, changes


def first_and_last(work: list[dict[str, Any]]) -> list[list[float]]:
    """Losses of some steps of each; the first entry is the evaluation before any."""
    from finhpc.training.engine import Engine

    found = []
    for changes in work:
        config = settings(**changes)
        engine = Engine(config, hf_config(config), torch.device("cpu"))
        values = [engine.evaluate(list(tokens(99)))]
        values += [engine.train_step(iter(tokens(step)), 1e-3) for step in range(1, GONE + 2)]
        found.append(values)
    return found


GUIDED: dict[str, Any] = {"blend_weight": "trainable", "blend_start": 1.0, "blend_schedule": "cosine"}
APART: dict[str, Any] = GUIDED | {"qkv": "separate", "optimizer": {"weight_decay": 0.0, "grad_clip": 0.0}}
TIED: dict[str, Any] = GUIDED | {"qkv": "separate", "head": "dense"}


@pytest.fixture(scope="module")
def guided() -> dict[str, list[float]]:
    """Self-guided training: the losses of `first_and_last` by variant."""
    rounded = {"quantization": {"bits": 4, "when": "during"}}
    work: dict[str, dict[str, Any]] = {
        "rounded": GUIDED | rounded | {"train": {"precision": "bf16"}},
        "recomputed": GUIDED | rounded | {"train": {"precision": "bf16", "recompute": "full"}},
        "llama": TRAINABLE | GUIDED,
        "apart": APART,
        "tied": TIED,
    }
    return dict(zip(work, run_processes(first_and_last, 1, list(work.values()))[0], strict=True))


def test_without_a_dense_model_it_starts_as_the_low_rank_model(guided: dict[str, list[float]]) -> None:
    batch = tokens(99).reshape(-1, SEQ)
    for name, changes in {"llama": TRAINABLE | GUIDED, "apart": APART, "tied": TIED}.items():
        config = settings(**changes)
        assert config.method.blend_start == 1, "at alpha 1 only W counts"
        plain: Any = initial_model(hf_config(config), config.train.seed, None).eval()
        with torch.no_grad():
            assert guided[name][0] == pytest.approx(plain(batch, labels=batch).loss.item(), rel=1e-6), name
    assert guided["rounded"] == guided["recomputed"]
    assert guided["rounded"][0] != pytest.approx(guided["apart"][0], rel=1e-6)


def test_self_guided_training_is_that_of_its_paper(guided: dict[str, list[float]]) -> None:
    """transformers' dense model in float64, with alpha W + (1 - alpha) B A for each weight; W starts as B A."""
    config = settings(**APART)
    start = initial_model(hf_config(config), config.train.seed, None).double()
    leaves = {name: p.detach().requires_grad_() for name, p in start.named_parameters()}
    layers = {name: layer for name, layer in start.named_modules() if isinstance(layer, LowRankLinear)}

    def product(name: str, blocks: int) -> Tensor:
        a, b = (leaves[f"{name}.{factor}.weight"].chunk(blocks) for factor in ("A", "B"))
        return torch.cat([rows @ columns for rows, columns in zip(b, a, strict=True)])

    w = {name: product(name, layer.blocks).detach().requires_grad_() for name, layer in layers.items()}
    dense: Any = GPT2LMHeadModel(as_dense(hf_config(config))).double()
    transposed = {name for name, module in dense.named_modules() if isinstance(module, Conv1D)}

    def loss(alpha: float, batch: Tensor) -> Tensor:
        weights = {name: leaf for name, leaf in leaves.items() if ".A." not in name and ".B." not in name}
        for name, layer in layers.items():
            mixed = (alpha * w[name] if alpha else 0) + (1 - alpha) * product(name, layer.blocks)
            weights[f"{name}.weight"] = mixed.T if name in transposed else mixed
            if layer.B.bias is not None:
                weights[f"{name}.bias"] = leaves[f"{name}.B.bias"]
        return torch.func.functional_call(dense, weights, (batch,), {"labels": batch}).loss  # type: ignore[no-any-return]

    optimizer = torch.optim.AdamW([*leaves.values(), *w.values()], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(1, GONE + 2):
        alpha = 0.5 * (1 + math.cos(math.pi * (step - 1) / (GONE - 1))) if step < GONE else 0.0
        value = loss(alpha, tokens(step).reshape(-1, SEQ))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert guided["apart"][1:] == pytest.approx(losses, rel=1e-5)
