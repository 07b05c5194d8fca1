"""Whoever trains for fewer steps than the warm-up takes is told before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import finhpc
from finhpc.commands.study.command import study
from finhpc.commands.sweep.command import sweep
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import FinetuneSweepConfig, StudyConfig, SweepConfig
from tests.models.dense import saved, tiny_llama
from tests.tiny import WORDS, pretrain_tree, with_tokenizer


@pytest.fixture
def tree(run_shards: Path, tmp_path: Path) -> dict[str, Any]:
    return pretrain_tree(run_shards, tmp_path, train={"steps": 6})


@pytest.fixture
def tuning(run_shards: Path, tmp_path: Path) -> dict[str, Any]:
    base = with_tokenizer(saved(tiny_llama(context=256), tmp_path / "model"), run_shards)
    rows = [f"{WORDS[i % 7]} {i}@{('negative', 'neutral', 'positive')[i % 3]}" for i in range(100)]
    (tmp_path / "news.txt").write_text("\n".join(rows) + "\n")
    return {
        "model": {"path": str(base)},
        "data": {"source": [str(tmp_path / "news.txt")], "max_len": 200, "eval_fraction": 0.0},
        "run": {"storage": str(tmp_path), "name": "run"},
    }


def test_a_pretraining(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    finhpc.pretrain(build(PretrainConfig, tree), dry_run=True)
    line = "optimizer.warmup_steps=20 is more than half of train.steps=6; the warm-up takes 3 steps"
    assert line in capsys.readouterr().err
    finhpc.pretrain(build(PretrainConfig, tree | {"train": {"steps": 40}}), dry_run=True)
    assert "warmup_steps" not in capsys.readouterr().err


def test_a_finetuning_whose_examples_say_how_long_it_is(
    tuning: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    finhpc.finetune(build(FinetuneConfig, tuning), dry_run=True)
    line = "optimizer.warmup_steps=20 is more than half of train.steps=6; the warm-up takes 3 steps"
    assert line in capsys.readouterr().err


def test_the_trials_of_a_sweep(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"train.steps": [6, 100], "optimizer.lr": [1e-3, 2e-3]}
    sweep(build(SweepConfig, tree | {"grid": grid}), dry_run=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "warmup_steps=20" in line]
    assert len(said) == 1
    assert said[0].startswith("2 trials, the first ")


def test_the_trials_of_a_finetuning_sweep(tuning: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    sweep(build(FinetuneSweepConfig, tuning | {"grid": {"lora.rank": [2, 4]}}), dry_run=True)
    assert "every trial: optimizer.warmup_steps=20 is more than half of train.steps=6" in capsys.readouterr().err


def test_the_phases_of_a_study(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    variants = {"dense": {"settings": {"method": {"kind": "dense"}}, "lr": [1e-3]}}
    about = {"variants": variants, "screen_steps": 4}
    study(build(StudyConfig, tree | {"train": {"steps": 50}, "study": about}), dry_run=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "warmup_steps" in line]
    assert [line.partition(":")[0] for line in said] == ["screening"]
    assert "train.steps=4; the warm-up takes 2 steps" in said[0]
