"""Checkpoints: complete or absent, written while training continues, readable by any topology.

    checkpoints/step_00000100/
        stage-0.safetensors     param.NAME and its moments (exp_avg.NAME, exp_avg_sq.NAME) of stage 0, float32
        rank-0.safetensors      random state of worker 0
        rank-0.done             what worker 0 wrote: name, bytes, sha256
        manifest.json           all files, and the state of the run; written last

Workers communicate through the shared folder, not through collectives: each writes its files in a thread, and worker
0's thread waits for all of them and writes the manifest. A folder without a manifest is not a checkpoint. Tensors have
Hugging Face names, so a run resumes with any number of stages and replicas.
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

    def stage_files(self) -> list[Path]:
        return sorted(self.path / name for name in self.manifest["files"] if name.startswith("stage-"))

    def verify(self) -> None:
        """Raise `CheckpointError` naming the first file that is missing or changed."""
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, not {expected['bytes']}")
            if file_sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file} is not what was written (sha256 differs)")
            if file.suffix == ".safetensors":
                try:
                    with safe_open(file, framework="pt"):
                        pass
                except SafetensorError as error:
                    reason = f"{file} is not a safetensors file ({error}); pickles are never opened"
                    raise CheckpointError(reason) from None


def read_stage(file: Path, prefix: str) -> dict[str, Tensor]:
    """Hugging Face name -> tensor stored as `prefix.NAME` in one stage's file."""
    with safe_open(file, framework="pt") as opened:
        names = [key for key in opened.keys() if key.startswith(prefix + ".")]  # noqa: SIM118
        return {key[len(prefix) + 1 :]: opened.get_tensor(key) for key in names}


def list_complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in `folder`, newest first; their contents are not verified."""
    checkpoints = []
    for path in sorted(folder.glob("step_*"), reverse=True):
        with suppress(CheckpointError):
            checkpoints.append(open_checkpoint(path))
    return checkpoints


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in `path`; raises `CheckpointError` if its manifest is missing or cut short."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["step"] >= 0 and manifest["files"] and manifest["workers"] and manifest["consumed"]:
            return Checkpoint(path, manifest)
    raise CheckpointError(f"{path / MANIFEST} is missing or cut short")


def latest_valid(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are all as they were written; None if none was ever completed.

    Newer damaged ones are logged and removed, so that they do not count among the stored ones. Raises
    `CheckpointError` if all are damaged, and removes none: the user decides whether to begin at step 0 again.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in sorted(folder.glob("step_*"), reverse=True):
        if not (path / MANIFEST).exists():  # an interrupted save, which is not damage
            continue
        try:
            latest = open_checkpoint(path)
            latest.verify()
        except CheckpointError as error:
            damaged[path] = error
            continue
        for other, why in damaged.items():
            log.info(f"checkpoint {other.name} is damaged ({why}); it is removed and {path.name} is used.")
            shutil.rmtree(other, ignore_errors=True)
        return latest
    if damaged:
        reasons = "; ".join(str(why) for why in damaged.values())
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({reasons}); restore one of them from a copy, or remove "
            f"{folder} to begin at step 0."
        )
    return None


def newest_checkpoint_bytes(folder: Path) -> int:
    """The bytes of the newest checkpoint, complete or not; they grow as long as any worker writes."""
    newest = max(folder.glob("step_*"), default=folder)
    total = 0
    with suppress(OSError):  # renamed or removed meanwhile
        for file in newest.iterdir():
            total += file.stat().st_size
    return total


def remove_partial(folder: Path) -> None:
    """Remove the folders of interrupted saves, which have no manifest."""
    for path in folder.glob("step_*"):
        if not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)


class Checkpointer:
    """Saves one worker's part of each checkpoint in a background thread.

    `attempt` is the same for all workers of one start and differs between starts, so that files of a killed start are
    never mistaken for new ones. Worker 0 completes the checkpoint and removes all but the `keep` newest.
    """

    def __init__(self, folder: Path, keep: int, attempt: str, world_rank: int, workers: int) -> None:
        self.folder, self.keep, self.attempt = folder, keep, attempt
        self.world_rank, self.workers = world_rank, workers
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, stage_file: str | None, state: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Copy `state` and return; a thread writes it. Waits for the previous save to end first.

        `stage_file`: the name for the stage's tensors, None on replicas that do not write them. Worker 0's `extra`
        goes into the manifest, except for `consumed`, which is summed over workers.
        """
        self.wait()
        random_state = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state["cuda"] = torch.cuda.get_rng_state()
        files = {f"rank-{self.world_rank}.safetensors": random_state}
        if stage_file:
            files[stage_file] = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items()}
        arguments = (self.folder / f"step_{step:08d}", step, files, extra)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the current save is complete; raises `CheckpointError` if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder}: {error}; free some space or check the disk. "
                "Earlier checkpoints are unchanged."
            )

    def _write(self, path: Path, step: int, files: dict[str, dict[str, Tensor]], extra: dict[str, Any]) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            written = {name: _save(path / name, tensors) for name, tensors in files.items()}
            done = {"attempt": self.attempt, "files": written, "consumed": extra.get("consumed", "0")}
            write_json(path / f"rank-{self.world_rank}.done", done)
            if self.world_rank == 0:
                self._complete(path, step, extra)
        except BaseException as error:  # for the training thread, which raises it
            self._error = error

    def _complete(self, path: Path, step: int, extra: dict[str, Any]) -> None:
        parts = [self._wait_for(path / f"rank-{rank}.done") for rank in range(self.workers)]
        consumed = sum(int(part["consumed"], 16) for part in parts) % 2**256
        manifest = {
            "format": FORMAT,
            "step": step,
            "workers": self.workers,
            **extra,
            "consumed": f"{consumed:064x}",
            "files": {name: about for part in parts for name, about in part["files"].items()},
        }
        write_json(path / MANIFEST, manifest)
        for old in list_complete(self.folder)[self.keep :]:
            (old.path / MANIFEST).unlink()  # first, so that a partly removed checkpoint does not look complete
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


def load_tensors(checkpoint: Checkpoint, names: list[str], prefix: str) -> dict[str, Tensor]:
    """The tensors `prefix.NAME` for each of `names`, from any stage's file."""
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for file in checkpoint.stage_files():
            opened = stack.enter_context(safe_open(file, framework="pt"))
            stored = set(opened.keys())
            for name in names:
                if name not in tensors and f"{prefix}.{name}" in stored:
                    tensors[name] = opened.get_tensor(f"{prefix}.{name}")
    if missing := sorted(set(names) - set(tensors)):
        raise CheckpointError(f"{checkpoint.path} lacks {', '.join(missing[:5])}; it belongs to another model.")
    return tensors


def load_random_state(checkpoint: Checkpoint, world_rank: int, workers: int) -> bool:
    """Restore this worker's random state; False if the checkpoint has another number of workers."""
    if checkpoint.manifest["workers"] != workers:
        return False
    with safe_open(checkpoint.path / f"rank-{world_rank}.safetensors", framework="pt") as opened:
        torch.set_rng_state(opened.get_tensor("torch"))
        if torch.cuda.is_available() and "cuda" in opened.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(opened.get_tensor("cuda"))
    return True


def _save(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, file, metadata={"format": "pt"})
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
