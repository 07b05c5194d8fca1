"""The figures in the rows, who stands beside whom, and what is left out."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from finhpc.commands.report.cells import COLUMNS, count, rows_of, three
from finhpc.commands.report.paper import paper_tables
from finhpc.commands.report.tables import Value, make_tables
from finhpc.files import write_csv
from finhpc.tracking.describe import trained_model
from finhpc.tracking.tags import PREFIX, SCORED_FROM
from tests.commands.report.store import Store


def test_table_vi_has_means_over_seeds_beside_the_papers_rows(paper_like: Store) -> None:
    (group,) = make_tables(paper_like.collected())["vi"].groups
    assert (group.scale.model, group.scale.width, group.scale.amount) == ("gpt2-small-cpu", 384, 10240)
    dense, low = group.rows
    assert (dense.label, low.label) == ("gpt2-small-cpu", "gpt2-small-cpu-r96")
    assert dense.values["worker_hours"] == Value(pytest.approx(0.5), pytest.approx(0.2))
    assert dense.values["val_loss"] == Value(pytest.approx(5.1), pytest.approx(0.2))
    assert dense.values["memory_gb"] == Value(pytest.approx(0.5), 0.0)  # both workers together
    assert dense.values["boolq"] == Value(50.0)  # one of the two was scored
    assert dense.values["winogrande"] is None
    assert dense.values["size_8bit_bytes"] is None
    assert low.values["params_total"] == Value(7_640_000.0)
    assert low.values["piqa"] == Value(53.0)
    assert dense.paper is not None
    assert low.paper is not None
    assert (dense.paper.label, low.paper.label) == ("GPT2-127M", "GPT2-127M-r192")  # 96 / 384 = 192 / 768
    assert low.paper.values["worker_hours"] == 121.0


def test_table_vii_has_method_2_at_the_shape_of_what_it_starts_from(paper_like: Store) -> None:
    (group,) = make_tables(paper_like.collected())["vii"].groups
    svd = group.find("svd", 96)
    assert svd is not None
    assert svd.label == "gpt2-small-cpu-r96"
    assert svd.paper is not None
    assert svd.paper.label == "GPT2-127M-r192"
    assert svd.paper.values["piqa"] == 58.9  # of Table VII, not VI
    assert svd.values["worker_hours"] == Value(0.3)
    assert svd.values["worker_hours_with_start"] == Value(pytest.approx(0.7))  # dense-0 took 0.4
    assert svd.values["boolq"] is None


def test_tables_viii_and_ix_have_the_base_and_its_adapters_in_the_papers_order(paper_like: Store) -> None:
    tables = make_tables(paper_like.collected())
    (scores,), (costs,) = tables["viii"].groups, tables["ix"].groups
    assert [row.label for row in scores.rows] == ["smol", "smol-r8 (4-bit)", "smol-r8 (8-bit)", "smol-r8 (16-bit)"]
    base, four = scores.rows[:2]
    assert base.values["fpb"] == Value(35.0)  # of its own evaluation, not of the other model's
    assert base.values["fiqa_sa"] is None
    assert base.paper is not None
    assert base.paper.label == "Llama2-7B"
    assert four.values["fpb"] == Value(80.0)
    assert four.values["held_out_f1"] == Value(pytest.approx(54.0))
    assert four.paper is not None
    assert four.paper.label == "Llama2-7B-r8 (4-bit)"
    cost = costs.rows[1].values
    assert cost["memory_gb"] == Value(0.45)
    assert cost["size_gb"] == Value(pytest.approx(0.068))
    assert cost["params_trainable"] == Value(2_440_000.0)
    assert cost["inference_s"] is None
    assert costs.rows[0].values["params_trainable"] == Value(134_500_000.0)
    assert costs.rows[0].values["worker_hours"] is None


def test_a_figure_not_measured_is_empty_in_csv_and_never_zero(paper_like: Store, tmp_path: Path) -> None:
    table = make_tables(paper_like.collected())["vi"]
    write_csv(tmp_path / "table.csv", rows_of(table))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    dense, low, *others = rows
    assert (dense["winogrande"], dense["winogrande_paper"]) == ("", "48.9")
    assert (low["size_8bit_bytes"], low["size_8bit_bytes_paper"]) == ("7700000.0", "77500000.0")
    assert float(dense["worker_hours_spread"]) == pytest.approx(0.2)
    assert [row["paper_model"] for row in others] == [
        row.label for row in paper_tables()["vi"].rows if row.label not in ("GPT2-127M", "GPT2-127M-r192")
    ]
    assert all(value != 0 for row in rows_of(table) for key, value in row.items() if not key.endswith("_spread"))
    for key in COLUMNS:
        assert all(
            row.values.keys() <= {name for c in COLUMNS[key] for name in c.keys} for row in paper_tables()[key].rows
        )


def test_runs_that_say_nothing_are_left_out_and_counted(store: Store) -> None:
    kept = store.pretrain("kept", "dense", result={"params_total": 13_890_000})
    store.pretrain("failed", "dense", status="FAILED", result={"params_total": 1})
    store.pretrain("stopped-early", "dense", result={"steps": 4, "params_total": 1})
    parent = store.pretrain("sweep", "dense", result={"params_total": 1})
    store.pretrain("child", "low_rank", 96, tags={"mlflow.parentRunId": parent}, result={"params_total": 7_640_000})
    store.pretrain("scored", "dense", tags={SCORED_FROM: kept}, result={"params_total": 1})
    found = store.collected()
    assert sorted(run.name for run in found.pretrained) == ["child", "kept"]
    assert [run.name for run in found.scored] == ["scored"]
    assert sum(found.left_out.values()) == 3
    (group,) = make_tables(found)["vi"].groups
    assert [row.values["params_total"] for row in group.rows] == [Value(13_890_000.0), Value(7_640_000.0)]


def test_the_best_settings_and_the_newest_run_of_a_seed_stand_for_a_row(store: Store) -> None:
    for name, lr, loss in (("slow", 1e-4, 6.0), ("good", 1e-3, 5.0)):
        store.pretrain(name, "low_rank", 96, settings={"optimizer": {"lr": lr}}, result={"val_loss": loss})
    store.pretrain("good-again", "low_rank", 96, settings={"optimizer": {"lr": 1e-3}}, result={"val_loss": 5.1})
    (group,) = make_tables(store.collected())["vi"].groups
    (row,) = group.rows
    assert row.values["val_loss"] == Value(5.1)
    assert row.settings == 2
    assert [run.name for run in row.runs] == ["good-again"]


def test_a_dense_model_has_no_ranks_whatever_a_grid_gave_it(store: Store) -> None:
    store.pretrain("dense-8", "dense", 8, result={"val_loss": 5.0})
    store.pretrain("dense-16", "dense", 16, seed=1, result={"val_loss": 5.2})
    (row,) = make_tables(store.collected())["vi"].groups[0].rows
    assert (row.rank, row.settings, row.train_seeds) == (None, 1, 2)
    assert row.values["val_loss"] == Value(pytest.approx(5.1), pytest.approx(0.2))


def test_only_rows_of_one_shape_data_and_amount_are_compared(store: Store) -> None:
    store.pretrain("one", "dense")
    store.pretrain("longer", "dense", result={"tokens": 20480})
    store.pretrain("other-data", "dense", tags={PREFIX + "dataset_fingerprint": "e" * 64})
    store.pretrain("wider", "dense", settings={"model": {"width": 768, "heads": 12, "layers": 12}})
    groups = make_tables(store.collected())["vi"].groups
    assert len(groups) == 4
    assert {group.scale.model for group in groups} == {"gpt2-small-cpu", "gpt2-127m"}


def test_other_ranks_methods_and_unknown_shapes_stand_alone(store: Store) -> None:
    store.pretrain("odd", "low_rank", 80)
    store.pretrain("dense", "dense")
    store.pretrain("method-3", "blend", 96, start="dense")
    store.pretrain("guided", "blend", 96)
    store.pretrain("from-hub", "svd", 96, settings={"model": {"path": "/hub/gpt2"}})
    store.pretrain("rounded", "low_rank", 96, settings={"quantization": {"bits": 4, "when": "during"}})
    tables = make_tables(store.collected())
    rows = {row.label: row for key in ("vi", "vii") for group in tables[key].groups for row in group.rows}
    assert rows["gpt2-small-cpu-r80"].paper is None
    assert [r.kind for g in tables["vi"].groups for r in g.rows if "self-guided" in r.label] == ["guided"]
    assert [row.label for group in tables["vii"].groups for row in group.rows if row.kind == "blend"] == [
        "gpt2-small-cpu-r96 (method 3)"
    ]
    assert rows["gpt2-small-cpu-r96 (method 3)"].paper is None
    assert rows["gpt2-small-cpu-r96 (method 3)"].remark == "not in the paper"
    assert rows["gpt2-r96"].paper is None  # MLflow does not say how wide it is
    assert rows["gpt2-small-cpu-r96 (4-bit)"].paper is None


def test_an_adapter_over_a_model_of_ours_is_beside_that_models_scores(store: Store) -> None:
    scores = {
        "evaluate/fpb/weighted_f1": 0.4,
        "evaluate/boolq/acc": 0.6,
        "evaluate/boolq/weighted_f1": 0.2,
        "evaluate/fpb/acc": 0.7,
        "worker_hours": 2.0,
    }
    store.pretrain("base", "dense", result=scores | {"params_total": 13_890_000, "size_16bit_bytes": 28_000_000})
    store.finetune("tuned", 4, 16, store.model("base"), result={"evaluate/fpb/weighted_f1": 0.5, "params_trainable": 9})
    tables = make_tables(store.collected())
    base, tuned = tables["viii"].groups[0].rows
    assert (base.label, tuned.label) == ("base", "base-r4 (16-bit)")
    assert (base.values["fpb"], base.values["boolq"]) == (Value(40.0), Value(60.0))
    assert tuned.values["boolq"] is None
    assert tables["ix"].groups[0].rows[0].values["worker_hours"] == Value(2.0)
    assert tables["ix"].groups[0].rows[0].values["size_gb"] == Value(0.028)


def test_a_base_from_elsewhere_has_the_speed_that_its_own_evaluation_was_given(store: Store) -> None:
    store.finetune("tuned", 8, 16, result={"params_trainable": 9, "generate_s": 0.5})
    speeds = {"generate_tokens_per_s": 4.0, "size_16bit_bytes": 270e6, "evaluate/fpb/weighted_f1": 0.3}
    store.evaluation(["smol"], speeds)  # named relative to a folder that nobody knows any more
    store.evaluation(["/models/smol"], {"evaluate/fpb/weighted_f1": 0.9}, adapters=["/x/tuned/model"])
    base, tuned = make_tables(store.collected())["ix"].groups[0].rows
    assert base.values["inference_s"] == Value(0.25)
    assert base.values["size_gb"] == Value(0.27)
    assert tuned.values["inference_s"] == Value(0.5)
    assert make_tables(store.collected())["viii"].groups[0].rows[0].values["fpb"] == Value(30.0)


@pytest.mark.parametrize(
    ("value", "text"), [(127.4e6, "127.4 M"), (0.59e9, "0.59 B"), (7.64e6, "7.64 M"), (9_000, "9,000")]
)
def test_counts_are_told_as_in_the_paper(value: float, text: str) -> None:
    assert count(value) == text


def test_small_figures_keep_their_digits() -> None:
    assert [three(value) for value in (184320, 195.2, 20.3, 0.214, 0.0534)] == [
        "184,320",
        "195.2",
        "20.30",
        "0.214",
        "0.0534",
    ]


HOURS = {"params_total": 10}


def with_start(store: Store, label: str) -> float | None:
    tables = make_tables(store.collected())
    rows = {row.label: row for group in tables["vii"].groups for row in group.rows}
    value = rows[label].values["worker_hours_with_start"]
    return value and value.mean


def test_a_start_counts_with_all_that_stand_behind_it(store: Store) -> None:
    """Dense, trained on, and then method 3 from that."""
    store.pretrain("dense", "dense", result=HOURS | {"worker_hours": 1.0})
    store.pretrain("longer", "dense", start="dense", result=HOURS | {"worker_hours": 2.0})
    store.pretrain("blended", "blend", 96, start="longer", result=HOURS | {"worker_hours": 4.0})
    assert with_start(store, "gpt2-small-cpu-r96 (method 3)") == 7.0


def test_a_decomposed_model_counts_as_the_training_that_it_was_made_of(store: Store, tmp_path: Path) -> None:
    store.pretrain("dense", "dense", result=HOURS | {"worker_hours": 1.0})
    low = tmp_path / "low"
    low.mkdir()
    (low / "result.json").write_text(json.dumps({"source": store.model("dense"), "model": str(low)}))
    tags = {PREFIX + "started_from": trained_model(str(low))}
    settings = {"model": {"path": str(low)}}
    store.pretrain("two", "svd", 96, settings=settings, tags=tags, result=HOURS | {"worker_hours": 3.0})
    assert with_start(store, "gpt2-small-cpu-r96") == 4.0


def test_runs_that_start_from_each_other_have_no_known_cost(store: Store) -> None:
    """A name that was used again: the newest run of it starts from what started from the oldest."""
    store.pretrain("one", "svd", 96, start="two", result=HOURS | {"worker_hours": 1.0})
    store.pretrain("two", "svd", 48, start="one", result=HOURS | {"worker_hours": 1.0})
    assert not any(
        row.values["worker_hours_with_start"]
        for group in make_tables(store.collected())["vii"].groups
        for row in group.rows
    )
