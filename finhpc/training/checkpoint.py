"""Checkpoints: complete or absent, written while training continues, readable by any topology.

    checkpoints/step_00000100/
        stage-0-replica-0.safetensors   param.NAME and its moments (exp_avg.NAME, exp_avg_sq.NAME) in float32: the
                                        share of replica 0 of stage 0; NAME[0:128] has rows 0 to 127 of a tensor
        rank-0.safetensors              random state of worker 0
        rank-0.done                     what worker 0 wrote: name, bytes, sha256
        manifest.json                   all files, and the state of the run; written last

Workers communicate through the shared folder, not through collectives: each writes its files in a thread, and worker
0's thread waits for all of them and writes the manifest. A folder without a manifest is not a checkpoint. Tensors have
Hugging Face names, so a run resumes with any number of stages and replicas. `finhpc.training.workers.resume` does that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finhpc.errors import CheckpointError
from finhpc.files import write_json

FORMAT = 1
MANIFEST = "manifest.json"
BEST_STEP, STOPPED_EARLY = "best_step", "stopped_early"  # in manifests of runs that keep the best evaluation
PIECE_BYTES = 1 << 26  # of a file, read or written at a time
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}  # as safetensors names them
_KEY = re.compile(r"(?P<name>.*?)(\[(?P<start>\d+):(?P<stop>\d+)\])?")


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

    def check_sizes(self) -> None:
        """Raise `CheckpointError` naming the first file that is missing or has another size."""
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, not {expected['bytes']}")

    def verify_files(self, names: Iterable[str]) -> Iterator[int]:
        """Check the contents of these files; yield the number of bytes after each piece that was read.

        Raises `CheckpointError` naming the first file that is changed.
        """
        self.check_sizes()
        for name in names:
            file, digest = self.path / name, hashlib.sha256()
            try:
                with open(file, "rb") as opened:
                    while piece := opened.read(PIECE_BYTES):
                        digest.update(piece)
                        yield len(piece)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
            if digest.hexdigest() != self.manifest["files"][name]["sha256"]:
                raise CheckpointError(f"{file} is not what was written (sha256 differs)")
            if file.suffix == ".safetensors":
                try:
                    with safe_open(file, framework="pt"):
                        pass
                except SafetensorError as error:
                    reason = f"{file} is not a safetensors file ({error}); pickles are never opened"
                    raise CheckpointError(reason) from None

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and tensor of everything stored as `prefix.NAME`, by name; one is in memory at a time."""
        parts: dict[str, list[_Stored]] = {}
        for file in self.stage_files():
            with safe_open(file, framework="pt") as opened:
                for stored in _stored(file, opened.keys(), prefix):
                    parts.setdefault(stored.name, []).append(stored)
        for name in sorted(parts):
            values = []
            for stored in sorted(parts[name], key=lambda part: part.start):
                with safe_open(stored.file, framework="pt") as opened:
                    values.append(opened.get_tensor(stored.key))
            yield name, values[0] if len(values) == 1 else torch.cat(values)

    def read_into(self, prefix: str, targets: Mapping[str, tuple[Tensor, int]]) -> None:
        """Overwrite each tensor with the rows stored as `prefix.NAME`, one at a time.

        `targets`: Hugging Face name -> tensor, and the row of the whole that its first row is. Raises
        `CheckpointError` if rows are missing.
        """
        missing = {name: len(target) if target.dim() else 1 for name, (target, _) in targets.items()}
        for file in self.stage_files():
            with safe_open(file, framework="pt") as opened:
                found = [stored for stored in _stored(file, opened.keys(), prefix) if stored.name in targets]
            for stored in found:  # opened for each: what was mapped counts as memory as long as a file is open
                with safe_open(file, framework="pt") as opened:
                    missing[stored.name] -= _copy_rows(opened, stored, *targets[stored.name])
        if lacking := sorted(name for name, rows in missing.items() if rows):
            raise CheckpointError(f"{self.path} lacks {', '.join(lacking[:5])}; it belongs to another model.")


class _Stored(NamedTuple):
    """A tensor of a stage's file: rows from `start` on of the tensor with that Hugging Face name."""

    file: Path
    key: str
    name: str
    start: int


def key_of(prefix: str, name: str, rows: slice | None) -> str:
    """The key in a file of some rows of a tensor, or of all of it."""
    return f"{prefix}.{name}" + ("" if rows is None else f"[{rows.start}:{rows.stop}]")


def _stored(file: Path, keys: list[str], prefix: str) -> Iterator[_Stored]:
    for key in keys:
        if key.startswith(prefix + ".") and (match := _KEY.fullmatch(key[len(prefix) + 1 :])):
            yield _Stored(file, key, match["name"], int(match["start"] or 0))


def _copy_rows(opened: Any, stored: _Stored, target: Tensor, first: int) -> int:
    """Copy the stored rows that `target`, which begins at row `first`, has; return their number."""
    view = opened.get_slice(stored.key)
    shape: list[int] = view.get_shape()
    if stored.start == first and shape == list(target.shape):
        target.copy_(opened.get_tensor(stored.key))
        return len(target) if target.dim() else 1
    if len(shape) != target.dim() or shape[1:] != list(target.shape[1:]):
        return 0
    begin, end = max(first, stored.start), min(first + len(target), stored.start + shape[0])
    if begin >= end:
        return 0
    target[begin - first : end - first].copy_(view[begin - stored.start : end - stored.start])
    return end - begin


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
    never mistaken for new ones. Worker 0 completes the checkpoint and removes all but the `keep` newest, and the best
    one if the run keeps it.
    """

    def __init__(self, folder: Path, keep: int, attempt: str, world_rank: int, workers: int) -> None:
        self.folder, self.keep, self.attempt = folder, keep, attempt
        self.world_rank, self.workers = world_rank, workers
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copied: torch.cuda.Event | None = None  # happens once the newest copy to the host is complete

    def save(self, step: int, stage_file: str | None, state: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Copy `state` and return; a thread writes it. Waits for the previous save to end first.

        From a GPU the copy is still under way then: call `wait_for_copy` before `state` changes. `stage_file`: the
        name for the state, None without any. Worker 0's `extra` goes into the manifest, except for `consumed`, which
        is summed over workers.
        """
        self.wait()
        random_state = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state["cuda"] = torch.cuda.get_rng_state()
        files = {f"rank-{self.world_rank}.safetensors": _HostCopy(random_state)}
        if stage_file:
            files[stage_file] = _HostCopy(state)
            self._copied = files[stage_file].copied
        arguments = (self.folder / f"step_{step:08d}", step, files, extra)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True, name="checkpoint")
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Let the GPU finish copying the newest state before what is launched from here on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

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

    def _write(self, path: Path, step: int, files: dict[str, _HostCopy], extra: dict[str, Any]) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            written = {name: copy.write(path / name) for name, copy in files.items()}
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
            if old.step == extra.get(BEST_STEP):
                continue
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


def load_random_state(checkpoint: Checkpoint, world_rank: int, workers: int) -> bool:
    """Restore this worker's random state; False if the checkpoint has another number of workers."""
    if checkpoint.manifest["workers"] != workers:
        return False
    with safe_open(checkpoint.path / f"rank-{world_rank}.safetensors", framework="pt") as opened:
        torch.set_rng_state(opened.get_tensor("torch"))
        if torch.cuda.is_available() and "cuda" in opened.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(opened.get_tensor("cuda"))
    return True


class _HostCopy:
    """A copy of tensors in host memory, as the bytes of a safetensors file.

    From a GPU it is made by a stream of its own, in pinned memory; `copied` happens once it is complete.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        cuda = any(tensor.is_cuda for tensor in tensors.values())
        total = sum(tensor.nbytes for tensor in tensors.values())
        self._pieces = [
            torch.empty(min(PIECE_BYTES, total - begin), dtype=torch.uint8, pin_memory=cuda)
            for begin in range(0, total, PIECE_BYTES)
        ]
        # safetensors wants tensors of larger elements first, so that all are aligned.
        ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
        self._header = _header(ordered)
        self.copied: torch.cuda.Event | None = None
        if not cuda:
            self._copy(ordered)
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._copy(ordered)
            self.copied = torch.cuda.Event()
            self.copied.record(stream)
        for tensor in ordered.values():
            if tensor.is_cuda:  # its memory must not be reused before, if it is freed
                tensor.record_stream(stream)

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        begin = 0
        for tensor in tensors.values():
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            while len(content):
                piece, offset = self._pieces[begin // PIECE_BYTES], begin % PIECE_BYTES
                size = min(len(content), len(piece) - offset)
                piece[offset : offset + size].copy_(content[:size], non_blocking=True)
                content, begin = content[size:], begin + size

    def write(self, file: Path) -> dict[str, Any]:
        """Write the file to the disk; return its bytes and sha256, computed on the way."""
        if self.copied is not None:
            self.copied.synchronize()
        digest = hashlib.sha256()
        with open(file, "wb") as opened:
            contents: list[Any] = [self._header, *(piece.numpy() for piece in self._pieces)]
            for content in contents:
                opened.write(content)
                digest.update(content)
            opened.flush()
            os.fsync(opened.fileno())
            return {"bytes": opened.tell(), "sha256": digest.hexdigest()}


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The beginning of a safetensors file: the length of a JSON text, and the text with each tensor's place."""
    places: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        offsets = [begin, begin + tensor.nbytes]
        places[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        begin = offsets[1]
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
