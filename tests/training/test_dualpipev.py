"""dualpipev in whole trainings: the numbers of one worker, stopped anywhere, and moved to and from 1f1b."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.processes import run_processes
from tests.training.test_blend import STEPS, checkpoint, losses, runs, settings
from tests.training.test_engine import hf_config

FOUR = {"micro_batch_size": 2, "micro_batches": 4}
DUAL = FOUR | {"schedule": "dualpipev"}
KINDS: dict[str, dict[str, Any]] = {
    "tied": {"kind": "dense"},
    "blend": {"blend_weight": "trainable", "embedding": "low_rank", "preset": "llama-tiny"},
    "rounded": {"kind": "low_rank", "quantization": {"bits": 8, "when": "during"}},
    "dropped": {"kind": "dense", "model": {"dropout": 0.1}},  # random numbers
}
STOPS = (3, 7, STEPS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind on one worker and with dualpipev on two, unbroken and stopped; one run moves between both."""
    folder = tmp_path_factory.mktemp("dualpipev")
    one = [(f"{name}1", settings(1, **changes, parallel=FOUR), (STEPS,)) for name, changes in KINDS.items()]
    run_processes(runs, 1, folder, [*one, ("tied-moved", settings(1, **KINDS["tied"], parallel=FOUR), (3,))])
    work = [("tied-moved", settings(2, **KINDS["tied"], parallel=DUAL), (6,))]
    for name, changes in KINDS.items():
        config = settings(2, **changes, parallel=DUAL)
        work += [(f"{name}2", config, (STEPS,)), (f"{name}2-stopped", config, STOPS)]
    run_processes(runs, 2, folder, [*work, ("tied-moved", settings(2, **KINDS["tied"], parallel=FOUR), (STEPS,))])
    return folder


@pytest.mark.parametrize("kind", ["tied", "blend", "rounded"])
def test_losses_and_scores_are_those_of_one_worker(kind: str, trained: Path) -> None:
    one, two = losses(trained / f"{kind}1"), losses(trained / f"{kind}2")
    assert two["alpha"] == one["alpha"]
    # Weights that are rounded may differ by a whole step after a difference in the last bit.
    relative = 2e-3 if kind == "rounded" else 2e-5
    for what in ("train", "norm", "eval"):
        assert two[what] == pytest.approx(one[what], rel=relative), what


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_started_again_it_is_bit_equal(kind: str, trained: Path) -> None:
    whole, again = trained / f"{kind}2", trained / f"{kind}2-stopped"
    assert losses(again) == losses(whole)
    ours, theirs = checkpoint(again, STEPS), checkpoint(whole, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_run_moves_from_one_schedule_to_the_other(trained: Path) -> None:
    moved, one = losses(trained / "tied-moved"), losses(trained / "tied1")
    for what in ("train", "norm", "eval"):
        assert moved[what] == pytest.approx(one[what], rel=2e-5), what


def test_worker_0_has_both_ends_and_a_tied_matrix_once(trained: Path) -> None:
    [ends, middle] = run_processes(held, 2)
    assert {"transformer.wte.weight", "transformer.ln_f.weight"} <= ends
    assert not ends & middle
    assert ends | middle == {name[6:] for name in checkpoint(trained / "tied2", 1) if name.startswith("param.")}


def held() -> set[str]:
    """The names that this worker owns."""
    from finhpc.training.engine import Engine

    config = settings(2, **KINDS["tied"], parallel=DUAL)
    return set(Engine(config, hf_config(config), torch.device("cpu"), [0, 3, 5, 7, 10]).owned_names())
