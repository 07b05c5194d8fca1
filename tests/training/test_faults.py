"""What training survives by itself, on real processes and files: a full disk, a hang, no memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finhpc.errors import CheckpointError
from finhpc.training.checkpoint import Checkpointer, list_complete, remove_partial
from finhpc.training.memory import is_out_of_memory
from finhpc.training.watchdog import EXIT_CODE
from finhpc.training.workers.resume import latest_valid


def state(numbers: int) -> dict[str, Tensor]:
    return {"param.w": torch.zeros(numbers)}


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: what a full disk does, without a disk to fill."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A small disk of its own at `folder`, filled to the last byte; room is made on leaving."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):  # no space left
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a disk of its own needs the right to mount; the other test limits file sizes instead")
    yield folder
    subprocess.run(["umount", folder], check=True)


def save_survives(folder: Path, full: AbstractContextManager[None]) -> None:
    saver = Checkpointer(folder, keep=2, attempt="a", world_rank=0, workers=1)
    saver.save(10, "stage-00000.safetensors", state(50_000), {})
    saver.wait()
    with full:
        saver.save(20, "stage-00000.safetensors", state(50_000), {})
        with pytest.raises(
            CheckpointError, match=r"could not be written .* free some space .* Earlier checkpoints are unchanged"
        ):
            saver.wait()
        good = latest_valid(folder)
        assert good is not None
        assert good.step == 10
    remove_partial(folder)  # as the next start does
    saver = Checkpointer(folder, keep=2, attempt="b", world_rank=0, workers=1)
    saver.save(20, "stage-00000.safetensors", state(50_000), {})
    saver.wait()
    assert [saved.step for saved in list_complete(folder)] == [20, 10]
    latest = latest_valid(folder)
    assert latest is not None
    assert latest.step == 20


def test_a_full_disk_leaves_the_checkpoint_before_intact(small_disk: Path) -> None:
    save_survives(small_disk, full_disk(small_disk))


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before_intact(tmp_path: Path) -> None:
    save_survives(tmp_path, limited_files(100_000))


HANG = """
import ctypes, sys, time
from pathlib import Path
from finhpc.training.watchdog import Watchdog
kind, steps = sys.argv[2], iter(range(10**9))
def stand_still():
    if kind == "python":
        time.sleep(280)
    else:
        ctypes.PyDLL(None).sleep(280)  # native code that keeps Python's lock
with Watchdog(Path(sys.argv[1]), 3, 0.4, (lambda: next(steps)) if kind == "moving" else (lambda: 0)) as dog:
    dog.settle()
    time.sleep(1.5) if kind == "moving" else stand_still()
"""


@pytest.mark.parametrize(("kind", "code"), [("python", EXIT_CODE), ("native", 1)])
def test_a_hung_process_writes_its_stacks_and_ends(kind: str, code: int, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANG, tmp_path, kind], capture_output=True, text=True, timeout=300)
    assert done.returncode == code
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name.startswith("rank-3-")
    text = file.read_text()
    assert "in stand_still" in text
    if kind == "python":
        assert text.startswith("worker 3 made no progress for 0 s (train.hang_timeout_s=0.4)")
        assert str(file) in done.stderr


def test_a_process_that_moves_is_left_alone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANG, tmp_path, "moving"], capture_output=True, timeout=300)
    assert done.returncode == 0
    assert list((tmp_path / "stacks").iterdir()) == []


def test_failed_allocations_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as none_left:
        bytearray(2**52)
    assert is_out_of_memory(none_left.value)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(other.value)
