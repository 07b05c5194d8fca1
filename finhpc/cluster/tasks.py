"""Resumable parallel Ray tasks: independent pieces of work, each of which leaves a file.

A command works in a folder of its own (`workplace`) on what no earlier attempt has finished (`run_tasks`). When it is
interrupted, the same command continues; with other settings it starts afresh.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

from finhpc.cluster.package import Driver
from finhpc.errors import ConfigError, DataError, FinhpcError
from finhpc.files import lock, private_folder, write_atomic

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
TRIES = 50  # to remove a folder


class UnfinishedError(FinhpcError):
    """The machine failed, not the input: a full disk, too little memory. The same command continues."""


class WorkerDiedError(UnfinishedError):
    """The process of a task or actor ended more often than Ray restarts it."""


def is_finished(out: Path, record: str, settings: str, what: str, work: Path) -> bool:
    """Return whether `out` holds the result of the same settings, by `settings_sha256` in its file `record`.

    `what`: what `out` holds when it is finished; `work`: the folder of unfinished work. Raises `ConfigError` if `out`
    holds anything else or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; give a folder.")
    stored = json.loads((out / record).read_bytes()) if (out / record).is_file() else {}
    if "settings_sha256" in stored:
        if stored["settings_sha256"] != settings:
            raise ConfigError(
                f"out={out} already holds {what} made with other settings or from another source ({record} lists "
                "them); choose another --out, or remove that folder."
            )
        shutil.rmtree(work, ignore_errors=True)  # left by a command that was killed at its very end
        log.info(f"{out} is finished with these settings already; nothing to do")
        return True
    is_ours = work.parent == out and work.is_dir()
    if out.is_dir() and not is_ours and any(out.iterdir()):
        raise ConfigError(f"out={out} holds other files; choose an empty or new folder.")
    try:
        TemporaryFile(dir=next(folder for folder in (out, *out.parents) if folder.exists())).close()
    except OSError as error:
        raise _not_writable(out, error) from None
    return False


def _not_writable(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"out={out} cannot be written ({error.strerror}); choose another --out.")


@contextmanager
def workplace(work: Path, out: Path, settings: str) -> Iterator[None]:
    """Lock the folder `work` for this process, and empty it if a run with other settings left it.

    A `ConfigError` or `DataError` removes it: correcting settings or text makes another run. Raises `RunBusyError` if
    another process works there.
    """
    try:
        private_folder(work.parent)
        private_folder(work)
    except OSError as error:
        raise _not_writable(out, error) from None
    with lock(work / "lock", f"out={out}", "choose another --out"):
        key = work / "settings"
        if key.is_file() and key.read_text() != settings:
            log.info(f"{out}: discarding the unfinished work of a run with other settings")
            for path in [path for path in work.iterdir() if path.name != "lock"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomic(key, settings)
        try:
            yield
        except (ConfigError, DataError):
            for _ in range(TRIES):  # tasks that were canceled may still write a file
                shutil.rmtree(work, ignore_errors=True)
                if not work.exists():
                    break
                time.sleep(0.1)
            raise


def run_tasks(
    work: Callable[[T], R], items: Iterable[T], name: Callable[[T], str], width: int, cpus: float = 1, gpus: float = 0
) -> Iterator[tuple[T, R]]:
    """Run `work(item)` in Ray tasks, at most `width` at once, and yield each item with its result as it ends.

    The next item is requested only when a task can start. `name` names an item in errors. Raises the error of the
    first item that fails: its own if it is a `FinhpcError`, else `UnfinishedError`.
    """
    import ray

    # Plain tasks, not Ray Data: they are short, and its scheduler left each core idle for a third of the time.
    task, driver = ray.remote(num_cpus=cpus, num_gpus=gpus)(attempt), Driver.here()
    waiting = iter(items)

    def start(running: int) -> tuple[Any, T] | None:
        if running < width:
            for item in waiting:
                return task.remote(work, item, name(item), driver), item
        return None

    for item, result in completed(start, name):
        if isinstance(result, FinhpcError):
            raise result
        yield item, result


def stream_task(
    work: Callable[[T], Iterator[R]], item: T, name: str, ahead: int | None, cpus: float, gpus: float
) -> Iterator[R]:
    """Run the generator `work(item)` in one Ray task and yield what it yields.

    It works at most `ahead` results in advance; None: it never waits, so that it ends and frees its CPUs and GPUs
    although nothing is requested. Raises its error if that is a `FinhpcError`, else `UnfinishedError`.
    """
    import ray
    from ray.exceptions import RayError

    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "num_returns": "streaming", "max_retries": 0}
    if ahead is not None:
        options["_generator_backpressure_num_objects"] = ahead
    references = ray.remote(_attempts).options(**options).remote(work, item, name, Driver.here())
    try:
        for reference in references:
            try:
                result = ray.get(reference)
            except RayError as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise WorkerDiedError(_unfinished(name, type(error).__name__, reason)) from None
            if isinstance(result, FinhpcError):
                raise result
            yield result
    finally:
        ray.cancel(references)


def completed(
    start: Callable[[int], tuple[Any, T] | None], name: Callable[[T], str]
) -> Iterator[tuple[T, Any | FinhpcError]]:
    """Yield each item with its result or error as soon as its remote call ends.

    `start(running)` starts another call and returns its reference and item, or None if none can start now.
    """
    import ray
    from ray.exceptions import RayError

    running: dict[Any, T] = {}
    try:
        while True:
            while (started := start(len(running))) is not None:
                running[started[0]] = started[1]
            if not running:
                return
            for reference in ray.wait(list(running), num_returns=1)[0]:
                item = running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayError as error:
                    reason = str(error).strip().splitlines()[0].rstrip(".")
                    result = WorkerDiedError(_unfinished(name(item), type(error).__name__, reason))
                yield item, result
    finally:
        for reference in running:
            ray.cancel(reference)


def attempt(work: Callable[[T], R], item: T, name: str, driver: Driver) -> R | FinhpcError:
    """Return the result of `work(item)`, or its error, which Ray would wrap in a traceback of its own."""
    try:
        driver.enter()
        return work(item)
    except Exception as error:
        return _own_error(error, name)


def _attempts(work: Callable[[T], Iterator[R]], item: T, name: str, driver: Driver) -> Iterator[R | FinhpcError]:
    """Like `attempt`, for a generator; an error is the last value."""
    try:
        driver.enter()
        yield from work(item)
    except Exception as error:
        yield _own_error(error, name)


def _own_error(error: Exception, name: str) -> FinhpcError:
    if isinstance(error, FinhpcError):
        return error
    return UnfinishedError(_unfinished(name, type(error).__name__, str(error)))


def _unfinished(name: str, kind: str, problem: str) -> str:
    return f"{name}: {kind}: {problem}; fix this and rerun the command; finished work is kept."
