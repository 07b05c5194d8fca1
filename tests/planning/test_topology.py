"""Topologies of a cluster, and the pace of each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finhpc.planning.costs import PretrainCosts, topologies
from finhpc.planning.devices import DEVICES, Cluster
from finhpc.planning.memory import Memory, Scheme, Topology
from finhpc.planning.outline import Outline
from finhpc.planning.step_time import Pace, launches, step_operations
from tests.planning.test_paper import outline


def cluster(nodes: int, device: str = "a100-80gb") -> Cluster:
    named = DEVICES[device]
    return Cluster(named, nodes, 8, 0.9 * named.memory_gb * 1e9, 0.4, "bf16")


def costs(model: Outline, topology: Topology, part_s: dict[str, float] | None = None) -> PretrainCosts:
    return PretrainCosts(Memory(model, Scheme()), topology, part_s)


def test_those_that_fit_come_first_the_fastest_first() -> None:
    memory = Memory(outline("llama2-7b", recompute="full"), Scheme("paper"))
    found = topologies(memory, cluster(2), 64, [1, 2])
    fitting = [row["fits"] for row in found]
    assert fitting == sorted(fitting, reverse=True)
    assert {True, False} == set(fitting)
    paces = [row["tokens_per_s"] for row in found if row["fits"]]
    assert paces == sorted(paces, reverse=True)
    for row in found:
        topology = Topology(row["stages"], row["replicas"], row["micro_batch_size"], row["micro_batches"])
        assert topology.samples_per_step == 64
        assert topology.workers == row["workers"] <= 16
        assert row["fits"] == (row["peak_bytes"] <= 72e9)
        assert row["peak_bytes"] == max(stage.peak_bytes for stage in memory.stages(topology)), "every stage must fit"


def test_llama2_70b_needs_many_nodes() -> None:
    memory = Memory(outline("llama2-70b", recompute="full"), Scheme("finhpc", precision="bf16", cuda=True))
    assert not any(row["fits"] for row in topologies(memory, cluster(1, "h100-80gb"), 256, [1]))
    best = topologies(memory, cluster(16, "h100-80gb"), 256, [1])[0]
    assert best["fits"]
    assert best["stages"] >= 16, "16 bytes of 69 billion parameters alone need 16 devices"


def test_a_step_of_llama_2_takes_what_table_i_says() -> None:
    # Table I: 184320 and 1720320 GPU hours of A100s; Touvron et al. 2023: 2 trillion tokens.
    for preset, hours in (("llama2-7b", 184_320), ("llama2-70b", 1_720_320)):
        rate = step_operations(outline(preset), 1) / 4096 * 2e12 / (hours * 3600)
        assert 0.36 < rate / DEVICES["a100-80gb"].rate("bf16") < 0.46, preset


def test_the_slowest_stage_sets_the_pace_and_even_ones_give_the_papers_utilisation() -> None:
    even = Pace([2.0] * 4, 0.0, 0.0, 8)
    assert even.passes_s == 2.0 * (8 + 4 - 1)
    assert even.utilization == pytest.approx(Topology(4, 1, 1, 8).utilization)
    uneven = Pace([1.0, 3.0], 0.5, 0.25, 8)
    assert uneven.passes_s == 4.0 + 7 * 3.0
    assert uneven.step_s == uneven.passes_s + 0.75
    assert uneven.utilization == pytest.approx(8 * (1.0 + 3.0) / (2 * 25.0)), "less than even stages would reach"


def test_time_counts_links_and_the_average_over_replicas() -> None:
    model = outline("llama2-7b")
    near = costs(model, Topology(2, 1, 1, 4)).pace(cluster(1))
    far = costs(model, Topology(2, 8, 1, 4)).pace(cluster(2))
    assert far.exchange_s > 2 * near.exchange_s
    assert all(a < b for a, b in zip(near.stage_s, far.stage_s, strict=True)), "stages lie on two nodes"


def test_a_gpu_takes_its_time_to_launch_however_little_there_is_to_compute() -> None:
    model = outline("llama2-7b")
    [launched], [computed] = (
        costs(model, Topology(1, 1, 1, 1)).pace(replace(cluster(1), device=device)).stage_s
        for device in (
            replace(DEVICES["a100-80gb"], tflops={"bf16": 1e9, "fp32": 1e9}),
            replace(DEVICES["a100-80gb"], launch_s=0.0),
        )
    )
    assert launched == pytest.approx(len(model.kinds) * 1e-3)
    assert computed > 10 * launched, "what is computed covers it, as a rule"
    assert launches("block") > launches("attention") + launches("mlp"), "its forward pass runs twice"


def test_measured_parts_give_back_their_share_of_the_rate() -> None:
    seconds = {"embedding": 0.0, "attention": 0.1, "mlp": 0.2, "norm": 0.0, "head": 0.05}
    model = outline("llama2-7b")
    measured = costs(model, Topology(2, 1, 1, 4), seconds)
    pace = measured.pace(cluster(1))
    assert sum(pace.stage_s) == pytest.approx(32 * 0.3 + 0.05)
    rate = step_operations(model, 1) / sum(pace.stage_s)
    assert measured.reached(2 * rate) == pytest.approx(0.5)
