"""Labels and a template of the user's own, from finetuning to the scores of evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from finhpc.commands.evaluate.command import evaluate
from finhpc.commands.finetune import finetune
from finhpc.commands.sweep.command import sweep
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.sweep import FinetuneSweepConfig
from tests.models.dense import saved, tiny_llama
from tests.tiny import WORDS, with_tokenizer

MOODS = ("0", "1.0", "2")


def table(path: Path, rows: range) -> str:
    lines = [f"{' '.join(WORDS[i % 7 : i % 7 + 3 + i % 4])} {i};{MOODS[i % 3]}" for i in rows]
    path.write_text("\n".join(["headline;mood", *lines]))
    return str(path)


@pytest.mark.slow
def test_evaluation_gives_the_held_out_scores_of_labels_of_ones_own(
    run_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = with_tokenizer(saved(tiny_llama(context=256), tmp_path / "base"), run_shards)
    templates = tmp_path / "mine.yaml"
    templates.write_text('stance: {prompt: "{headline}\\nOne of {labels}:", answer: "{label}"}')
    data = {
        "template": "stance",
        "templates": str(templates),
        "columns": {"label": "mood"},
        "labels": {"0": "dovish", "1": "hawkish", "2": "neutral"},
    }
    files = {
        "source": [table(tmp_path / "a.csv", range(40))],
        "eval_source": [table(tmp_path / "b.csv", range(60, 80))],
    }
    tree = {
        "model": {"path": str(base)},
        "lora": {"rank": 4},
        "data": {**data, **files, "max_len": 200},
        "parallel": {"micro_batch_size": 4},
        "optimizer": {"lr": 5e-3, "warmup_steps": 2},
        "train": {"steps": 6, "eval_every": 0, "checkpoint_every": 0},
        "run": {"name": "run", "storage": str(tmp_path / "runs")},
    }
    result = finetune(build(FinetuneConfig, tree))
    scores = result["scores"]["stance"]
    assert scores["n"] == 20
    scored = evaluate(
        build(
            EvaluateConfig,
            {
                "model": [str(base)],
                "adapter": [result["model"]],
                "tasks": ["stance"],
                "data": {**data, "files": {"stance": files["eval_source"][0]}},
                "bootstrap": 0,
                "run": {"name": "scores", "storage": str(tmp_path / "runs")},
            },
        )
    )
    found = scored["models"][-1]["scores"]["stance"]
    assert found["acc"] == pytest.approx(scores["acc"])
    assert found["weighted_f1"] == pytest.approx(scores["weighted_f1"])
    capfd.readouterr()
    run = {"name": "sweep", "storage": str(tmp_path / "runs")}
    swept = sweep(build(FinetuneSweepConfig, {**tree, "grid": {"lora.rank": [2, 4]}, "run": run}))
    assert all(0 <= trial["held_out_weighted_f1"] <= 1 for trial in swept["trials"])
    told = capfd.readouterr().err
    assert told.count("a.csv: read as separated by semicolons") == 1, "once for all trials"
    assert "0 = dovish, 1 = hawkish, 2 = neutral" in told
