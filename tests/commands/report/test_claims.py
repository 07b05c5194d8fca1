"""The claims, from runs whose figures are known."""

from __future__ import annotations

from typing import Any

import pytest

from finhpc.commands.report.claims import Claim, make_claims, verdict
from finhpc.commands.report.curves import mean_curve, steps_to
from finhpc.commands.report.figures import smoothed
from finhpc.commands.report.tables import make_tables
from finhpc.tracking.tags import SWEEP
from tests.commands.report.store import Store

R96 = "r96 / GPT2-127M-r192"


@pytest.fixture(scope="module")
def claims(paper_like: Store) -> list[Claim]:
    found = paper_like.collected()
    return make_claims(found, make_tables(found))


@pytest.mark.parametrize(
    ("name", "at", "paper", "ours", "said"),
    [
        ("Fewer parameters", R96, "1.64 x", "1.82 x", "holds"),
        ("Less training time", R96, "1.15 x", "2.00 x", "holds"),
        ("Faster training steps", R96, "1.15 x", "1.50 x", "holds"),
        ("Less training memory", R96, "1.01 x", "-", "not measured"),
        ("Faster inference", R96, "1.20 x", "2.00 x", "holds"),
        ("No loss of quality", R96, "-13.8 / +0.8 / +1.8", "PIQA -2.0, validation loss +0.300", "does not hold"),
        ("Method 2 ends with a lower loss", R96, "yes", "4.800 against 5.400", "holds"),
        # From 5.6 at step 2 to 5.2 at step 4: at 5.4 after 3 of 10 steps.
        ("Method 2 converges faster", R96, "yes", "after 30% of the steps", "holds"),
        ("Finetuning raises the average of the general", "Llama2-13B-r16", "+6.3", "-", "not measured"),
        ("Finetuning raises the average of the financial", "smol-r8 (16-bit) /", "+24.0", "+35.0 points", "holds"),
        ("Finetuning memory, 16 bits over 8", "smol-r8 (8-bit) / Llama2-7B-r8", "1.43 x", "1.50 x", "holds"),
        ("Finetuning memory, 16 bits over 4", "smol-r8 (4-bit) / Llama2-7B-r8", "1.72 x", "2.00 x", "holds"),
        ("Model size, 16 bits over 4", "smol-r8 (4-bit) / Llama2-7B-r8", "2.63 x", "4.00 x", "holds"),
        ("Finetuning memory, all weights over LoRA", "Llama2-13B-r16", "6.30 x", "-", "not measured"),
    ],
)
def test_a_claim_is_told_with_both_figures(
    claims: list[Claim], name: str, at: str, paper: str, ours: str, said: str
) -> None:
    (claim,) = [claim for claim in claims if claim.claim.startswith(name)]
    assert claim.at.startswith(at)
    assert claim.paper.startswith(paper)
    assert (claim.ours, claim.verdict) == (ours, said)


def test_nothing_is_claimed_of_what_was_not_measured(store: Store) -> None:
    store.pretrain("dense", "dense")
    found = store.collected()
    claims = make_claims(found, make_tables(found))
    assert claims
    assert {claim.verdict for claim in claims} == {"not measured"}
    assert {claim.ours for claim in claims} == {"-"}


@pytest.mark.parametrize(
    ("ours", "said"),
    [(1.64, "holds"), (1.2, "in part"), (1.0, "does not hold"), (0.8, "does not hold"), (None, "not measured")],
)
def test_a_claim_holds_from_the_papers_figure_on(ours: float | None, said: str) -> None:
    assert verdict(ours, 1.64, neutral=1) == said


def test_curves_are_crossed_between_their_points_and_smoothed_in_windows() -> None:
    assert steps_to({2: 6.0, 4: 5.0}, 5.5) == 3.0
    assert steps_to({2: 5.0}, 5.5) == 2.0
    assert steps_to({2: 6.0, 4: 5.8}, 5.5) is None
    assert mean_curve([{1: 2.0, 2: 4.0}, {2: 2.0, 3: 1.0}]) == {2: 3.0}, "only where all seeds have a value"
    assert smoothed({1: 1.0, 2: 3.0, 3: 5.0, 4: 7.0}, points=2) == {2: 2.0, 4: 6.0}


LONG = {"params_total": 10, "worker_hours": 1.0, "tokens_per_s": 100.0, "peak_memory_bytes": [10]}  # 102 s of steps


@pytest.mark.parametrize(
    ("dense", "low", "apart"),
    [
        ({}, {"settings": {"parallel": {"stages": 2, "micro_batches": 4}}}, "stages 1 and 2"),
        ({}, {"settings": {"parallel": {"replicas": 2}}}, "replicas 1 and 2"),
        ({"place": {"device": "NVIDIA H100"}}, {}, "device NVIDIA H100 and cpu"),
        ({}, {"place": {"threads": 2}}, "threads per worker 1 and 2"),
    ],
)
def test_time_and_memory_of_runs_placed_differently_are_not_comparable(
    store: Store, dense: dict[str, Any], low: dict[str, Any], apart: str
) -> None:
    store.pretrain("dense", "dense", result=LONG, **dense)
    store.pretrain("low", "low_rank", 96, result=LONG, **low)
    found = store.collected()
    claims = {claim.claim: claim for claim in make_claims(found, make_tables(found))}
    for name in ("Less training time", "Faster training steps", "Less training memory"):
        assert (claims[name].verdict, claims[name].ours) == ("not comparable", apart), name
    assert claims["Fewer parameters"].verdict == "does not hold", "sizes do not depend on the place"


def test_short_trainings_and_cold_starts_say_nothing_about_time(store: Store) -> None:
    short = LONG | {"tokens_per_s": 1000.0}
    store.pretrain("dense", "dense", result=short)
    store.pretrain("low", "low_rank", 96, result=short, tags={SWEEP: "ranks"})
    found = store.collected()
    claims = {claim.claim: claim for claim in make_claims(found, make_tables(found))}
    assert claims["Less training time"].ours == "cold and warm starts; only 10 s of steps, below 60"
    assert claims["Faster training steps"].ours == "only 10 s of steps, below 60"
    assert claims["Less training memory"].verdict != "not comparable", "a peak does not depend on the time"


def test_finetuning_memory_is_compared_only_between_like_places(store: Store) -> None:
    for bits, device in ((16, "cpu"), (8, "NVIDIA H100")):
        store.finetune(f"r8-{bits}", 8, bits, result={"peak_memory_bytes": [bits]}, place={"device": device})
    found = store.collected()
    claims = {claim.claim: claim for claim in make_claims(found, make_tables(found))}
    claim = claims["Finetuning memory, 16 bits over 8"]
    assert (claim.verdict, claim.ours) == ("not comparable", "device cpu and NVIDIA H100")
