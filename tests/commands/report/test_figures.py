"""What the scatter plots show, and that nothing is drawn of what is not there."""

from __future__ import annotations

import pytest

from finhpc.commands.report.figures import Point, make_figures, pretrained_points, tuned_points
from finhpc.commands.report.tables import Group, make_tables
from finhpc.tracking.tags import SCORED_FROM
from tests.commands.report.store import Store


def _rows(store: Store) -> tuple[Group, Group]:
    """Groups of Tables VI and VII."""
    tables = make_tables(store.collected())
    return tables["vi"].groups[0], tables["vii"].groups[0]


def test_sizes_are_those_logged_or_two_bytes_a_parameter(store: Store) -> None:
    low = store.pretrain("low", "low_rank", 96, result={"params_total": 7e6, "val_loss": 5.0, "size_16bit_bytes": 15e6})
    store.pretrain("dense", "dense", result={"params_total": 13e6, "val_loss": 4.5})
    for bits, loss in ((8, 5.1), (4, 5.5)):
        settings = {"quantization": {"bits": bits}}
        result = {"val_loss": loss, "size_bytes": 7e6 * bits / 8}
        store.pretrain(f"low-{bits}", "low_rank", 96, settings=settings, result=result, tags={SCORED_FROM: low})
    found = store.collected()
    (group,) = make_tables(found)["vi"].groups
    assert pretrained_points(found, group.scale, group.rows, "size") == [
        Point(26e6, 4.5, "dense", 16, "dense", measured=False),
        Point(15e6, 5.0, "low_rank", 16, "r96"),
        Point(7e6, 5.1, "low_rank", 8, "r96"),
        Point(3.5e6, 5.5, "low_rank", 4, "r96"),
    ]


def test_time_counts_the_training_that_a_model_starts_from(paper_like: Store) -> None:
    found, (_, group) = paper_like.collected(), _rows(paper_like)
    dense, svd = pretrained_points(found, group.scale, group.rows, "time")
    assert (dense.x, dense.measured) == (pytest.approx(0.5), True)
    assert (svd.x, svd.measured) == (pytest.approx(0.7), True)


def test_time_of_a_start_that_nobody_tracked_is_told_apart(store: Store) -> None:
    path = {"model": {"path": "/hub/gpt2"}}
    store.pretrain("two", "svd", 96, settings=path, result={"worker_hours": 0.3, "val_loss": 5.0})
    found = store.collected()
    (group,) = make_tables(found)["vii"].groups
    assert pretrained_points(found, group.scale, group.rows, "time") == [Point(0.3, 5.0, "svd", 16, "r96", False)]


def test_adapters_are_ranked_by_held_out_labels_or_by_the_financial_tasks(paper_like: Store, store: Store) -> None:
    tables = make_tables(paper_like.collected())
    points, measure = tuned_points(tables["viii"].groups[0].rows, tables["ix"].groups[0].rows, "size")
    assert measure == "weighted F1 of held-out labels"
    assert [(p.bits, p.x, p.y) for p in points] == [
        (4, pytest.approx(68e6), pytest.approx(54.0)),
        (8, pytest.approx(136e6), pytest.approx(58.0)),
        (16, pytest.approx(272e6), pytest.approx(66.0)),
    ]
    scores = {"evaluate/fpb/weighted_f1": 0.8, "evaluate/tfns/weighted_f1": 0.6, "worker_hours": 0.5}
    store.finetune("tuned", 8, 16, result=scores)
    tables = make_tables(store.collected())
    points, measure = tuned_points(tables["viii"].groups[0].rows, tables["ix"].groups[0].rows, "time")
    assert measure == "mean of FPB, FiQA SA and TFNS"
    assert points == [Point(0.5, pytest.approx(70.0), "lora", 16, "r8")]


def test_nothing_is_drawn_of_what_is_not_there(store: Store) -> None:
    store.pretrain("one", "dense", result={"params_total": 13e6})
    found = store.collected()
    assert make_figures(found, make_tables(found)) == []
