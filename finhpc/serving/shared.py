"""What the replicas of a server share: a folder with the list of adapters, their metrics, and whether they drain.

    STATE/adapters.json     name -> folder of every adapter that is served
    STATE/draining          exists while the server ends: new requests are refused
    STATE/metrics/ID.prom   the metrics of each replica, rewritten every second

A replica that starts, the first time or again, serves the adapters of the list.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from finhpc.errors import CheckpointError
from finhpc.files import private_folder, write_atomic, write_json

LOCK_S = 30.0
GONE_S = 15.0  # metrics that are older are of a replica that has ended


class Shared:
    """The folder of one server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.list, self._draining, self._metrics = folder / "adapters.json", folder / "draining", folder / "metrics"

    def create(self, adapters: Mapping[str, str]) -> None:
        """Create the folder, with these adapters and those that an earlier server's clients have loaded."""
        private_folder(self.folder)
        private_folder(self._metrics)
        self._draining.unlink(missing_ok=True)
        for old in self._metrics.glob("*.prom"):
            old.unlink(missing_ok=True)
        with self.changing() as listed:
            listed |= adapters

    def adapters(self) -> dict[str, str]:
        """Return name -> folder. Raises `CheckpointError` for a damaged list."""
        try:
            tree = json.loads(self.list.read_text(encoding="utf-8"))
            return {str(name): str(folder) for name, folder in tree.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError):
            raise CheckpointError(f"{self.list} is damaged; remove it and load the adapters again.") from None

    def stamp(self) -> tuple[int, int] | None:
        """Return what changes with the list."""
        with suppress(OSError):
            status = self.list.stat()
            return status.st_mtime_ns, status.st_ino
        return None

    @contextmanager
    def changing(self) -> Iterator[dict[str, str]]:
        """Yield the list and write it at the end of the block; one process at a time."""
        with FileLock(self.folder / "adapters.lock", timeout=LOCK_S):
            listed = self.adapters()
            before = dict(listed)
            yield listed
            if listed != before or not self.list.exists():
                write_json(self.list, listed)

    @property
    def draining(self) -> bool:
        return self._draining.exists()

    def drain(self) -> None:
        """Let all replicas refuse new requests."""
        write_atomic(self._draining, b"")

    def write_metrics(self, replica: str, text: bytes) -> None:
        partial = self._metrics / f"{replica}.partial"
        partial.write_bytes(text)
        os.replace(partial, self._metrics / f"{replica}.prom")  # never read in part; not worth a wait for the disk

    def metrics(self) -> dict[str, str]:
        """Return the metrics of every replica that runs, in Prometheus' text format."""
        texts = {}
        for path in sorted(self._metrics.glob("*.prom")):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime < GONE_S:
                    texts[path.stem] = path.read_text(encoding="utf-8")
        return texts
