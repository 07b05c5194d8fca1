"""Grids and distributions become trials; what cannot be one is refused with the value and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finhpc.cli import main, parse
from finhpc.commands.sweep import plan as sweep_plan
from finhpc.commands.sweep.grid import check_points, trials_of
from finhpc.commands.sweep.plan import plan_sweep
from finhpc.errors import ConfigError
from finhpc.settings.base import build, load
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import FinetuneSweepConfig, SweepConfig


def config(grid: dict[str, Any], **sections: Any) -> SweepConfig:
    return build(SweepConfig, {"grid": grid, **sections})


def test_a_grid_is_every_combination_with_its_settings() -> None:
    trials = trials_of(config({"method.rank": [8, 16], "train.seed": [0, 1]}, train={"steps": 7}))
    assert [trial.name for trial in trials] == ["rank8-seed0", "rank8-seed1", "rank16-seed0", "rank16-seed1"]
    settings = trials[2].config()
    assert isinstance(settings, PretrainConfig)
    assert (settings.method.rank, settings.train.seed, settings.train.steps) == (16, 0, 7)


def test_bits_after_training_are_scores_of_one_training() -> None:
    trials = trials_of(config({"method.rank": [8, 16], "quantization.bits": [16, 8, 4]}))
    assert [trial.bits for trial in trials] == [(16, 8, 4), (16, 8, 4)]
    assert [name for name, _ in trials[0].points] == ["rank8", "rank8-8bit", "rank8-4bit"]
    assert trials[0].config().quantization.bits == 16
    assert [values["quantization.bits"] for _, values in trials[0].points] == [16, 8, 4]


def test_bits_during_training_are_trainings_of_their_own() -> None:
    trials = trials_of(config({"quantization.when": ["during"], "quantization.bits": [8, 4]}))
    assert [(t.config().quantization.bits, t.bits) for t in trials] == [(8, ()), (4, ())]
    both = trials_of(config({"quantization.when": ["after", "during"], "quantization.bits": [8]}))
    assert [(t.config().quantization.bits, t.bits) for t in both] == [(16, (8,)), (8, ())]


def test_bits_of_a_finetuning_are_trained_with() -> None:
    sweep = build(FinetuneSweepConfig, {"grid": {"quantization.bits": [16, 4], "lora.rank": [4]}})
    trials = trials_of(sweep)
    assert [(t.config().quantization.bits, t.bits) for t in trials] == [(16, ()), (4, ())]


def test_draws_are_bounded_and_the_same_each_time() -> None:
    grid = {"optimizer.lr": {"log_uniform": [1e-4, 1e-2]}, "method.rank": [8, 16]}
    sweep = config(grid, sweep={"samples": 5, "seed": 3})
    trials = trials_of(sweep)
    rates = [trial.values["optimizer.lr"] for trial in trials]
    assert len(trials) == 10
    assert len(set(rates)) == 10
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert [t.name for t in trials_of(sweep)] == [t.name for t in trials]
    assert [t.name for t in trials_of(config(grid, sweep={"samples": 5, "seed": 4}))] != [t.name for t in trials]


def test_names_are_unique_and_fit_a_folder() -> None:
    grid = {"method.ranks": [{"mlp": rank, "attention": rank, "embedding": 8} for rank in range(8, 20)]}
    names = [trial.name for trial in trials_of(config(grid, method={"embedding": "low_rank"}))]
    assert len(set(names)) == 12
    assert all(len(name) <= 128 and " " not in name for name in names)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({}, "grid is empty"),
        ({"method.rank": []}, r"method\.rank=\[\] has no values"),
        ({"method.rnak": [8]}, r"method\.rnak is not a setting; did you mean 'method\.rank"),
        ({"method.rank": 8}, "neither a list of values nor one distribution"),
        ({"method.rank": [8, 8]}, "contains a value twice"),
        ({"optimizer.lr": {"log_uniform": [0, 1]}}, "has no usable bounds; log_uniform takes"),
        ({"optimizer.lr": {"uniform": [1, float("inf")]}}, "has no usable bounds"),
        ({"optimizer.lr": {"normal": [0, 1]}}, "neither a list"),
        ({"run.name": ["a"]}, r"run\.name cannot vary"),
    ],
)
def test_grids_that_cannot_be(grid: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_points(config(grid))


def test_every_problem_of_a_grid_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        config({"method.rnak": [8], "train.seed": [], "quantization.bits": [5], "train.steps": [8, -8]})
    assert len(error.value.problems) == 4


def test_a_mistyped_key_hides_no_other_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of flags, the YAML file and the grid, whatever is wrong with each."""
    file = tmp_path / "sweep.yaml"
    file.write_text("train: {stesp: 5}\nmodel: {layers: none}\n")
    words = ["--config", str(file), "--method.rnak", "8", "--optimizer.lr", "fast", "--grid", "method.rnk=[8]"]
    assert main(["sweep", *words]) == 2
    told = capsys.readouterr().err
    for key in ("--method.rnak", "train.stesp", "model.layers", "optimizer.lr", "grid: method.rnk"):
        assert key in told
    assert main(["finetune", "--lora.rnk", "8", "--optimizer.lr", "fast", "--config", "nowhere.yaml"]) == 2
    told = capsys.readouterr().err
    for key in ("--lora.rnk", "optimizer.lr", "config=nowhere.yaml"):
        assert key in told


def test_a_grid_without_points_hides_no_problem_of_its_runs(tmp_path: Path) -> None:
    sweep = config({}, run={"storage": str(tmp_path)}, data={"shards": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError) as error:
        plan_sweep(sweep, tmp_path / "sweep")
    assert "grid is empty" in str(error.value)
    assert "nowhere is not a folder" in str(error.value)


def test_a_problem_that_several_trials_share_is_one_line(tmp_path: Path) -> None:
    sweep = config({"train.seed": list(range(5))}, run={"storage": str(tmp_path)}, data={"shards": "nowhere"})
    with pytest.raises(ConfigError) as error:
        plan_sweep(sweep, tmp_path / "sweep")
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith("data.shards=")
    assert sweep_plan._of_trials(["a", "b"], 3) == "trials a, b: "
    assert sweep_plan._of_trials(["a"], 3) == "trial a: "
    assert sweep_plan._of_trials(list("abcd"), 9) == "trials a, b, c and 1 more: "


def test_a_missing_gpu_hides_no_problem_of_the_trials(
    run_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_plan, "known_resources", lambda: {"CPU": 2.0})
    model, run = {"preset": "gpt2-tiny", "layers": 2, "width": 32}, {"storage": str(tmp_path)}
    sections = {"model": model, "data": {"shards": str(run_shards), "seq_len": 32}, "run": run}
    sweep = config({"method.rank": [8, 64]}, resources={"device": "cuda"}, **sections)
    with pytest.raises(ConfigError) as error:
        plan_sweep(sweep, tmp_path / "sweep")
    assert error.value.problems[0].startswith("resources.device=cuda, but the cluster has no GPU")
    assert error.value.problems[1].startswith("trial rank64: method.rank=64 does not fit")


def test_the_number_of_trials_is_bounded_and_said() -> None:
    grid = {"method.rank": list(range(1, 101)), "train.seed": list(range(20))}
    with pytest.raises(ConfigError, match=r"the grid has 2,000 points, more than sweep\.max_trials=1,000"):
        check_points(config(grid))
    assert len(trials_of(config(grid, sweep={"max_trials": 2000}))) == 2000
    with pytest.raises(ConfigError, match=r"sweep\.samples=4, but no key"):
        check_points(config({"method.rank": [8]}, sweep={"samples": 4}))


def test_the_command_takes_grids_as_words() -> None:
    words = [
        "--grid",
        "method.rank=[8,16]",
        "--grid=optimizer.lr=[1e-3, 2e-3]",
        "--grid",
        "train.seed={randint: [0, 9]}",
    ]
    _, overrides, _ = parse(words, SweepConfig)
    grid = load(SweepConfig, None, overrides).grid
    expected = {"method.rank": [8, 16], "optimizer.lr": [1e-3, 2e-3], "train.seed": {"randint": [0, 9]}}
    assert grid == expected
    assert parse(["--grid", "method.rank"], SweepConfig)[2][0].startswith("--grid method.rank has no values")
