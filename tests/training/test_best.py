"""Which evaluation is the best one, and when a run has waited long enough for a better one."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finhpc.commands.finetune import Finetune
from finhpc.files import write_json
from finhpc.log import redirected
from finhpc.runs.folder import RunFolder
from finhpc.runs.result import collect
from finhpc.settings.finetune import FinetuneConfig
from finhpc.training.checkpoint import MANIFEST, open_checkpoint
from finhpc.training.finetuning.best import Best
from finhpc.training.journal import latest, read
from tests.commands.test_finetune import LABELS, config
from tests.models.dense import saved, tiny_llama
from tests.tiny import WORDS, with_tokenizer


def taken(metric: str, values: list[float], patience: int | None = None) -> tuple[Best, list[bool]]:
    best = Best(metric, patience)
    return best, [best.improves({"step": step, metric: value}) for step, value in enumerate(values, 1)]


def test_a_loss_is_better_if_lower_and_the_first_of_equal_ones_counts() -> None:
    best, improved = taken("val_loss", [math.nan, 2.0, 1.0, 1.0, 1.5], patience=3)
    assert improved == [False, True, True, False, False]
    assert (best.step, best.value, best.waited, best.stops) == (3, 1.0, 2, False)
    assert not best.improves({"step": 5, "val_loss": 0.1}), "the same evaluation, again after a resume"
    best.improves({"step": 6, "val_loss": 1.0})
    assert best.stops


def test_a_share_is_better_if_higher() -> None:
    best, improved = taken("val_weighted_f1", [0.2, 0.5, 0.4])
    assert improved == [True, True, False]
    assert (best.step, best.stops) == (2, False)


def written(folder: Path, step: int, **more: Any) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir()
    (path / "rank-0.safetensors").write_bytes(b"1234")
    files = {"rank-0.safetensors": {"bytes": 4, "sha256": ""}}
    write_json(path / MANIFEST, {"step": step, "workers": 1, "consumed": "0", "files": files, **more})
    return path


def test_it_goes_on_where_a_checkpoint_was_written(tmp_path: Path) -> None:
    best, _ = taken("val_loss", [2.0, 1.0, 3.0], patience=2)
    of_best = written(tmp_path, 2)
    latest = open_checkpoint(written(tmp_path, 3, **best.labels))
    (again := Best("val_loss", 2)).resume(latest, 1)
    assert again == best
    (of_best / "rank-0.safetensors").write_bytes(b"12")
    lines: list[str] = []
    with redirected(lines.append):
        (anew := Best("val_loss", 2)).resume(latest, 1)
    assert (anew.step, anew.waited) == (None, 0)
    assert "of step 2, is lost" in lines[0]


@pytest.fixture(scope="module")
def base(run_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(saved(tiny_llama(context=256), tmp_path_factory.mktemp("base") / "model"), run_shards)


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("news") / "news.txt"
    lines = [f"{' '.join(WORDS[i % 7 : i % 7 + 3 + i % 4])} {i}@{LABELS[i % 3]}" for i in range(40)]
    file.write_text("\n".join(lines) + "\n", encoding="latin-1")
    return file


def trained(settings: FinetuneConfig, folder: Path) -> dict[str, Any]:
    """Train in this process and return the result, as the command does after its workers."""
    from finhpc.training.engine import process_group

    job, cpu = Finetune(settings), torch.device("cpu")
    folder.mkdir(exist_ok=True)
    job.prepare(folder)
    with process_group("gloo"):
        Finetune.trainer(job.config.model_dump(), folder, cpu, job.fingerprints[0]).run()
    return collect(job, folder, 1.0, lambda: Finetune.use_model(job.config.model_dump(), folder, cpu))


def of_evaluations(folder: Path, key: str) -> dict[int, float]:
    return {step: record[key] for step, record in latest(read(folder / "journal.jsonl")[0], "eval").items()}


@pytest.mark.parametrize("patience", [None, 2])
def test_the_model_is_that_of_the_best_evaluation(patience: int | None, base: Path, tmp_path: Path) -> None:
    """The loss first falls, as the share of labels is learned, then grows: the held-out words have the other label."""
    kinds = [0, 0, 0, 1, 1]
    texts = [(WORDS[kinds[i % 5]], LABELS[kinds[i % 5]]) for i in range(40)]
    learned, held_out = tmp_path / "learned.txt", tmp_path / "held-out.txt"
    for file, pairs in ((learned, texts), (held_out, [(WORDS[i % 2], LABELS[0]) for i in range(8)])):
        lines = [f"{word} {word} {file.stem} {i}@{label}\n" for i, (word, label) in enumerate(pairs)]
        file.write_text("".join(lines), encoding="latin-1")
    every = {"steps": 10, "eval_every": 1, "checkpoint_every": 3, "keep_checkpoints": 1}
    best_of = every | {"best_by": "val_loss", "patience": patience}
    data = {"loss": "labels", "eval_source": [f"{held_out}:phrasebank"], "eval_fraction": 0.0}
    rate = {"lr": 1.5e-3, "warmup_steps": 0, "min_lr_ratio": 1.0}
    settings = config(base, learned, tmp_path, data=data, optimizer=rate, train=best_of)
    run, stored = tmp_path / "run", tmp_path / "run" / "checkpoints"
    result, val = trained(settings, run), of_evaluations(run, "val_loss")
    best = min(val, key=lambda step: val[step])
    last = best + patience if patience else 10
    assert 1 < best < last <= 10, val
    assert patience is None or last < 10
    assert (result["steps"], result["stopped_early"]) == (last, patience is not None)
    assert (result["model_step"], result["val_loss"]) == (best, val[best])
    assert sorted(path.name for path in stored.iterdir()) == [f"step_{best:08d}", f"step_{last:08d}"]
    weights = load_file(run / "model" / "adapter_model.safetensors")
    for name, tensor in open_checkpoint(stored / f"step_{best:08d}").tensors("param"):
        layer, _, factor = name.rpartition(".")
        assert torch.equal(weights[f"base_model.model.{layer}.lora_{factor}.weight"], tensor)
    RunFolder(tmp_path, "run").write_result(result)
    assert RunFolder(tmp_path, "run").is_finished(10)

    for lost in (None, last):  # killed after the last checkpoint, and before it
        if lost:
            shutil.rmtree(stored / f"step_{lost:08d}")
        again = trained(settings, run)
        for key in ("steps", "stopped_early", "model_step", "val_loss", "consumed_sha256"):
            assert again[key] == result[key]
        assert of_evaluations(run, "val_loss") == val
        resumed = load_file(run / "model" / "adapter_model.safetensors")
        assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_labels_are_learned_among_themselves_and_choose_the_model(base: Path, news: Path, tmp_path: Path) -> None:
    data = {"loss": "labels", "label_smoothing": 0.1, "balanced": True}
    every = {"steps": 4, "eval_every": 1, "checkpoint_every": 1, "keep_checkpoints": 9, "best_by": "val_weighted_f1"}
    settings, run = config(base, news, tmp_path, data=data, train=every), tmp_path / "run"
    result, f1 = trained(settings, run), of_evaluations(run, "val_weighted_f1")
    assert len(f1) == 4
    assert result["model_step"] == max(f1, key=lambda step: f1[step])
    assert result["held_out_weighted_f1"] == pytest.approx(f1[result["model_step"]]), "as the end of a run chooses"
    assert result["val_loss"] < 2 * math.log(3), "of three labels, not of a vocabulary"
    val, weights = of_evaluations(run, "val_loss"), load_file(run / "model" / "adapter_model.safetensors")
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    again = trained(settings, run)
    assert (again["resumed_from_step"], again["model_step"]) == (2, result["model_step"])
    assert of_evaluations(run, "val_loss") == val
    resumed = load_file(run / "model" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
