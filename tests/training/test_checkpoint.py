"""Checkpoints: complete or absent, verified, kept by number, read by any topology."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from finhpc.errors import CheckpointError
from finhpc.files import file_sha256, write_json
from finhpc.log import redirected
from finhpc.training import checkpoint
from finhpc.training.checkpoint import Checkpointer, list_complete, load_random_state
from finhpc.training.workers.resume import latest_valid
from tests.training.processes import run_processes


def state(value: float) -> dict[str, Tensor]:
    return {f"{prefix}.w": torch.full((3, 4), value) for prefix in ("param", "exp_avg", "exp_avg_sq")}


def save(folder: Path, step: int, value: float = 1.0, attempt: str = "a", keep: int = 2) -> None:
    saver = Checkpointer(folder, keep, attempt, world_rank=0, workers=1)
    saver.save(step, "stage-00000-replica-00000.safetensors", state(value), {"consumed": "ff"})
    saver.wait()


def test_a_save_is_read_back_and_old_ones_go(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, value=step)
    found = list_complete(tmp_path)
    assert [saved.step for saved in found] == [30, 20]
    assert latest_valid(tmp_path) == found[0]
    assert torch.equal(dict(found[0].tensors("param"))["w"], torch.full((3, 4), 30.0))
    assert int(found[0].manifest["consumed"], 16) == 255


def test_the_copy_is_taken_before_save_returns(tmp_path: Path) -> None:
    weights = state(1.0)
    saver = Checkpointer(tmp_path, 2, "a", 0, 1)
    saver.save(1, "stage-00000-replica-00000.safetensors", weights, {})
    weights["param.w"].fill_(99.0)  # the next step changes the weights in place
    saver.wait()
    assert dict(list_complete(tmp_path)[0].tensors("param"))["w"].max() == 1.0


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_newest_is_passed_over_and_said(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    file = tmp_path / "step_00000020" / "stage-00000-replica-00000.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-5])
    else:
        file.unlink()
    said: list[str] = []
    with redirected(said.append):
        good = latest_valid(tmp_path)
    assert good is not None
    assert good.step == 10
    assert "step_00000020 is damaged" in said[0]
    assert [saved.step for saved in list_complete(tmp_path)] == [10], "a damaged one must not count among those kept"


def test_only_damaged_checkpoints_are_refused_and_none_is_touched(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    os.truncate(tmp_path / "step_00000010" / "stage-00000-replica-00000.safetensors", 7)
    (tmp_path / "step_00000020" / "rank-0.safetensors").unlink()
    os.truncate(tmp_path / "step_00000030" / "manifest.json", 100)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .* to begin at step 0") as caught:
        latest_valid(tmp_path)
    for name in ("step_00000010/stage-00000-replica-00000", "step_00000020/rank-0", "step_00000030/manifest.json"):
        assert name in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_never_was_complete_is_no_damage(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step_00000010" / "manifest.json").unlink()
    assert latest_valid(tmp_path) is None


def test_a_pickle_in_place_of_tensors_is_not_opened(tmp_path: Path) -> None:
    """Even one whose sha256 was put into the manifest."""
    save(tmp_path, 10)
    file = tmp_path / "step_00000010" / "stage-00000-replica-00000.safetensors"
    with open(file, "wb") as opened:
        torch.save({"param.w": torch.ones(3, 4)}, opened)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    write_json(file.parent / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match=r"is not a safetensors file .* pickles are never opened"):
        latest_valid(tmp_path)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "step_00000020" / "manifest.json").unlink()
    assert [saved.step for saved in list_complete(tmp_path)] == [10]
    checkpoint.remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010"]


def test_files_of_a_killed_start_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    """Worker 1's file of an earlier attempt lies there: worker 0 must wait for the new one."""
    first = [Checkpointer(tmp_path, 2, "old", rank, 2) for rank in (0, 1)]
    first[1].save(10, None, {}, {})
    first[1].wait()
    second = [Checkpointer(tmp_path, 2, "new", rank, 2) for rank in (0, 1)]
    second[0].save(10, "stage-00000-replica-00000.safetensors", state(1.0), {})
    second[0]._thread.join(0.5)  # type: ignore[union-attr]
    assert list_complete(tmp_path) == []
    second[1].save(10, None, {}, {"consumed": "2"})
    second[1].wait()
    second[0].wait()
    assert list_complete(tmp_path)[0].manifest["workers"] == 2


def test_a_failed_write_is_raised_and_the_one_before_is_intact(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 10)
    saver = Checkpointer(folder, 2, "a", 0, 1)
    (folder / "step_00000020").write_text("a file where the folder must go")
    saver.save(20, "stage-00000-replica-00000.safetensors", state(2.0), {})
    with pytest.raises(CheckpointError, match="Earlier checkpoints are unchanged"):
        saver.wait()
    assert latest_valid(folder) == list_complete(folder)[0]
    saver.wait()  # raised once


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match="lacks other"):
        list_complete(tmp_path)[0].read_into("param", {"w": (torch.ones(3, 4), 0), "other": (torch.ones(3, 4), 0)})


def test_random_state_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    save(tmp_path, 10)
    expected = torch.rand(3)
    torch.manual_seed(6)
    assert load_random_state(list_complete(tmp_path)[0], world_rank=0, workers=1)
    assert torch.equal(torch.rand(3), expected)
    assert not load_random_state(list_complete(tmp_path)[0], world_rank=0, workers=2)


def test_a_half_removed_checkpoint_is_not_complete(tmp_path: Path) -> None:
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_00000020")
    (tmp_path / "step_00000020" / "rank-0.safetensors").unlink()
    said: list[str] = []
    with redirected(said.append):
        good = latest_valid(tmp_path)
    assert good is not None
    assert good.path.name == "step_00000010"


def test_rows_of_several_files_are_put_together_and_read_in_any_division(tmp_path: Path) -> None:
    whole = torch.arange(28.0).reshape(7, 4)
    divisions = ((0, 3), (3, 4), (4, 7))
    savers = [Checkpointer(tmp_path, 2, "a", rank, 3) for rank in range(3)]
    for rank, (start, stop) in reversed(list(enumerate(divisions))):
        part: dict[str, Tensor] = {f"param.w[{start}:{stop}]": whole[start:stop]}
        part |= {"param.bias": torch.ones(5), "param.ids": torch.ones(3, dtype=torch.uint8)} if rank == 1 else {}
        savers[rank].save(10, f"stage-00000-replica-{rank:05d}.safetensors", part, {})
    for saver in savers:
        saver.wait()
    (saved,) = list_complete(tmp_path)
    assert torch.equal(dict(saved.tensors("param"))["w"], whole)
    for start, stop in ((0, 7), (2, 5), (3, 4), (6, 7)):
        target = torch.full((stop - start, 4), -1.0)
        saved.read_into("param", {"w": (target, start)})
        assert torch.equal(target, whole[start:stop])
    with pytest.raises(CheckpointError, match="lacks w"):
        saved.read_into("param", {"w": (torch.ones(3, 4), 5)})  # rows 5 to 7, of which 7 is not stored
    with pytest.raises(CheckpointError, match="lacks w"):
        saved.read_into("param", {"w": (torch.ones(7, 3), 0)})
    with safe_open(saved.stage_files()[1], framework="pt") as opened:  # by the library, which checks the layout
        assert opened.get_tensor("param.ids").dtype == torch.uint8


def test_pieces_of_a_file_are_written_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 40)  # no tensor fits into one
    tensors = {f"param.{i}": torch.randn(5, i + 3) for i in range(4)} | {"param.t": torch.randn(4, 6).T}
    saver = Checkpointer(tmp_path, 2, "a", 0, 1)
    saver.save(10, "stage-00000-replica-00000.safetensors", tensors, {})
    saver.wait()
    saved = latest_valid(tmp_path)
    assert saved is not None
    read = dict(saved.tensors("param"))
    assert all(torch.equal(read[name[6:]], value) for name, value in tensors.items())


def found_together(folder: Path) -> list[Any]:
    """In each process: the step of the checkpoint that all agree on, or the error, and the rounds it took."""
    results: list[Any] = []
    for name in ("one damaged", "all damaged", "nothing"):
        rounds: list[int] = []
        rank, workers = dist.get_rank(), dist.get_world_size()
        try:
            saved = latest_valid(folder / name, rank, workers, lambda rounds=rounds: rounds.append(1))  # type: ignore[misc]
            results.append((saved and saved.step, len(rounds)))
        except CheckpointError as error:
            results.append((str(error), len(rounds)))
        dist.barrier()
    return results


def test_workers_verify_a_file_each_and_agree(tmp_path: Path) -> None:
    for name in ("one damaged", "all damaged", "nothing"):
        folder = tmp_path / name
        folder.mkdir()
        for step in (10, 20) if name != "nothing" else ():
            save(folder, step)
            for file in (folder / f"step_{step:08d}").glob("*.safetensors"):
                if name == "all damaged" or (step == 20 and file.name.startswith("rank-")):
                    file.write_bytes(file.read_bytes()[:-1] + b"x")
    first, second = run_processes(found_together, 2, tmp_path)
    assert first == second
    (step, rounds), (error, _), (none, _) = first
    assert step == 10
    assert rounds == 2, "each of two checkpoints is verified in one round, which counts as progress on both workers"
    assert "every checkpoint in" in error
    assert none is None
    assert [saved.step for saved in list_complete(tmp_path / "one damaged")] == [10]
    assert [saved.step for saved in list_complete(tmp_path / "all damaged")] == [20, 10]
