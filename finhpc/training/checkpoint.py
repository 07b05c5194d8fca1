"""Checkpoints: complete or absent, written beside the training, readable by any topology.

    checkpoints/step_00000100/
        stage-0.safetensors     param.NAME and its moments (exp_avg.NAME, exp_avg_sq.NAME) of stage 0, float32
        rank-0.safetensors      random state of worker 0
        rank-0.done             what worker 0 wrote: name, bytes, sha256
        manifest.json           all of it, and the state of the run; written last

Workers talk through the shared folder, not through collectives: each writes its files in a thread,
and worker 0's thread waits for all and writes the manifest. A folder without one is no checkpoint.
Tensors bear Hugging Face names, so a run resumes with any number of stages and replicas.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finhpc.errors import CheckpointError
from finhpc.files import file_sha256, write_json

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Hugging Face name -> tensor of everything stored as `prefix.NAME`, over all stages."""
        return {name: t for file in self.stage_files() for name, t in read_stage(file, prefix).items()}

    def stage_files(self) -> list[Path]:
        return sorted(self.path / name for name in self.manifest["files"] if name.startswith("stage-"))

    def verify(self) -> None:
        """Raises `CheckpointError` naming the first file that is not as it was written."""
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, not {expected['bytes']}")
            if file_sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file} is not what was written (sha256 differs)")
            if file.suffix == ".safetensors":
                _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{file} is no safetensors file ({error}); pickles are never opened") from None


def read_stage(file: Path, prefix: str) -> dict[str, Tensor]:
    """Hugging Face name -> tensor stored as `prefix.NAME` in one stage's file."""
    with safe_open(file, framework="pt") as opened:
        names = [key for key in opened.keys() if key.startswith(prefix + ".")]  # noqa: SIM118
        return {key[len(prefix) + 1 :]: opened.get_tensor(key) for key in names}


def list_complete(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints in `folder`, newest first; contents not verified."""
    found = [open_checkpoint(path) for path in sorted(folder.glob("step_*"), reverse=True)]
    return [saved for saved in found if isinstance(saved, Checkpoint)]


def open_checkpoint(path: Path) -> Checkpoint | CheckpointError:
    """The checkpoint in `path`, or why it is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["step"] >= 0 and manifest["files"] and manifest["ranks"] and manifest["consumed"]:
            return Checkpoint(path, manifest)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return CheckpointError(f"{path / MANIFEST} is missing or cut short")


def latest_valid(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose every file is as it was written; None where none was ever completed.

    Says which damaged ones it passed over, and removes them, so that they do not count among those
    kept. Raises `CheckpointError` when there are only damaged ones, and touches none: to begin at step
    0 again is for the user to decide.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in sorted(folder.glob("step_*"), reverse=True):
        opened = open_checkpoint(path)
        try:
            if isinstance(opened, CheckpointError):
                if (path / MANIFEST).exists():  # without one it is no damage, but a save that was interrupted
                    raise opened
                continue
            opened.verify()
        except CheckpointError as error:
            damaged[path] = error
            continue
        for other, why in damaged.items():
            log.info(f"checkpoint {other.name} is damaged ({why}); it is removed and {path.name} taken.")
            shutil.rmtree(other, ignore_errors=True)
        return opened
    if damaged:
        found = "; ".join(str(why) for why in damaged.values())
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({found}); restore one of them from a copy, or remove "
            f"{folder} to begin at step 0."
        )
    return None


def newest_checkpoint_bytes(folder: Path) -> int:
    """Bytes of the newest checkpoint, by any worker, complete or not: they grow as long as somebody writes."""
    newest = max(folder.glob("step_*"), default=folder)
    total = 0
    with suppress(OSError):  # renamed or removed meanwhile
        for file in newest.iterdir():
            total += file.stat().st_size
    return total


def remove_partial(folder: Path) -> None:
    """Remove what an interrupted save left: it has no manifest."""
    for path in folder.glob("step_*"):
        if not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)


class Checkpointer:
    """Saves one worker's part of each checkpoint in a background thread.

    `attempt` is the same for all workers of one start and differs between starts, so that files
    left by a killed start are never taken for new ones. Worker 0 completes the checkpoint and keeps
    the `keep` newest.
    """

    def __init__(self, folder: Path, keep: int, attempt: str, rank: int, ranks: int) -> None:
        self.folder, self.keep, self.attempt, self.rank, self.ranks = folder, keep, attempt, rank, ranks
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, stage_file: str | None, state: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Copy `state` and return; a thread writes it. Waits for the save before, if still under way.

        `stage_file`: name for the stage's tensors, None on replicas that do not write them. `extra`
        goes into the manifest (worker 0's) but for `consumed`, which is summed over workers.
        """
        self.wait()
        copy = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
        random_state = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state["cuda"] = torch.cuda.get_rng_state()
        arguments = (self.folder / f"step_{step:08d}", step, stage_file, copy, random_state, extra)
        self._thread = threading.Thread(target=self._guarded, args=arguments, daemon=True, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save under way is complete; raises `CheckpointError` if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder}: {error}; make room or check the disk. "
                "The checkpoints before it are untouched."
            )

    def _guarded(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # kept for the training thread, which raises it
            self._error = error

    def _write(
        self,
        path: Path,
        step: int,
        stage_file: str | None,
        state: dict[str, Tensor],
        random_state: dict[str, Tensor],
        extra: dict[str, Any],
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        files = {f"rank-{self.rank}.safetensors": random_state} | ({stage_file: state} if stage_file else {})
        written = {name: _save(path / name, tensors) for name, tensors in files.items()}
        done = {"attempt": self.attempt, "files": written, "consumed": extra.get("consumed", "0")}
        write_json(path / f"rank-{self.rank}.done", done)
        if self.rank == 0:
            self._complete(path, step, extra)

    def _complete(self, path: Path, step: int, extra: dict[str, Any]) -> None:
        parts = [self._wait_for(path / f"rank-{rank}.done") for rank in range(self.ranks)]
        consumed = sum(int(part["consumed"], 16) for part in parts) % 2**256
        manifest = {
            "format": FORMAT,
            "step": step,
            "ranks": self.ranks,
            **extra,
            "consumed": f"{consumed:064x}",
            "files": {name: about for part in parts for name, about in part["files"].items()},
        }
        write_json(path / MANIFEST, manifest)
        for old in list_complete(self.folder)[self.keep :]:
            (old.path / MANIFEST).unlink()  # first, so that a half-removed one is not taken for complete
            shutil.rmtree(old.path, ignore_errors=True)

    def _wait_for(self, file: Path, timeout_s: float = 1800) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                part: dict[str, Any] = json.loads(file.read_text())
                if part["attempt"] == self.attempt:
                    return part
            except (FileNotFoundError, ValueError):
                pass
            time.sleep(0.02)
        raise TimeoutError(f"{file} did not appear within {timeout_s:.0f} s")


def load_tensors(saved: Checkpoint, wanted: list[str], prefix: str) -> dict[str, Tensor]:
    """The tensors `prefix.NAME` for each of `wanted`, from whichever stage's file holds them."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for file in saved.stage_files():
            opened = stack.enter_context(safe_open(file, framework="pt"))
            stored = set(opened.keys())
            for name in wanted:
                if name not in found and f"{prefix}.{name}" in stored:
                    found[name] = opened.get_tensor(f"{prefix}.{name}")
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise CheckpointError(f"{saved.path} lacks {', '.join(missing[:5])}; it belongs to another model.")
    return found


def load_random_state(saved: Checkpoint, rank: int, ranks: int) -> bool:
    """Restore this worker's random state; False when the checkpoint was made by another number of workers."""
    if saved.manifest["ranks"] != ranks:
        return False
    with safe_open(saved.path / f"rank-{rank}.safetensors", framework="pt") as opened:
        torch.set_rng_state(opened.get_tensor("torch"))
        if torch.cuda.is_available() and "cuda" in opened.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(opened.get_tensor("cuda"))
    return True


def _save(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, file, metadata={"format": "pt"})
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
