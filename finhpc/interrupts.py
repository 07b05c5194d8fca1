"""End a command on a signal: cleanly on the first, immediately on the second.

SIGINT (Ctrl-C) raises `KeyboardInterrupt`, SIGTERM and SIGHUP (a closed terminal) raise `Terminated`, so that files are
closed on the way out and the same command resumes; a run saves a checkpoint before it ends by `Terminated`. A second
Ctrl-C immediately ends the command and every process that it started: a thread does that, because the main thread may
be inside a library that does not return.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, ParamSpec

P = ParamSpec("P")
SAME_PRESS_S = 0.1  # a wrapper such as `uv run` repeats a Ctrl-C that the terminal has already sent
PATIENCE_S = 1.0  # a clean end that takes longer prints how to end immediately
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived: the run stops here and the same command resumes it."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class _State:
    """This process's state."""

    since: float | None = None  # time of the first signal
    exit_code: int | None = None  # once it ends because of a signal
    watching = False
    interrupts = 0  # seen by the main thread
    repeated = False  # the next SIGINT repeats one that was lost
    at_once = threading.Event()
    ending: tuple[int, ...] = ()  # those of ENDING that raise `Terminated`
    folders: ClassVar[set[str]] = set()  # removed on an immediate end


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Terminated`, so that workers, run and lock are released cleanly."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        drop_closed_streams()
        raise Terminated(number)

    before: dict[int, Any] = {}
    try:
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, stop)
        _State.ending = tuple(before)
    except ValueError:  # not the main thread, which handles signals
        pass
    try:
        yield
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)


@contextmanager
def terminable_again() -> Iterator[None]:
    """After `Terminated`: let another SIGTERM or SIGHUP raise it again while the block runs."""
    begin = time.monotonic()

    def stop(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - begin > SAME_PRESS_S:  # otherwise a wrapper repeats the first one
            for each in _State.ending:
                signal.signal(each, signal.SIG_IGN)
            raise Terminated(number)

    for number in _State.ending:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in _State.ending:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def removed_at_once(folder: str) -> Iterator[None]:
    """Remove `folder` if the command ends immediately while the block runs."""
    _State.folders.add(folder)
    try:
        yield
    finally:
        _State.folders.discard(folder)


def interruptible(main: Callable[P, int]) -> Callable[P, int]:
    """Let a command's `main` end on signals as described above, with exit code 128 + the signal's number."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        _watch()
        try:
            with terminable():
                return main(*args, **kwargs)
        except KeyboardInterrupt:
            _State.exit_code = 128 + signal.SIGINT
        except Terminated as ended:
            _State.exit_code = ended.exit_code
        return _State.exit_code

    return run


def _watch() -> None:
    """Start, once per process, the thread that sees signals even while the main thread does not."""
    if _State.watching or threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    if (other := signal.set_wakeup_fd(writer, warn_on_full_buffer=False)) != -1:  # it belongs to an event loop
        signal.set_wakeup_fd(other)
        return
    _State.watching = True
    atexit.register(_leave)  # before any library registers its own, so that it is called last
    sys.unraisablehook = _deliver_again(sys.unraisablehook)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    threading.Thread(target=_follow, args=(reader,), name="finhpc-signals", daemon=True).start()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise in the main thread at Ctrl-C; at the second one only wait for the end, without printing tracebacks."""
    _State.interrupts += 1
    if _State.interrupts > 1 and _State.at_once.wait(0.5):
        time.sleep(60)
    raise KeyboardInterrupt


def _follow(reader: int) -> None:
    """React to every signal as it arrives."""
    hint = True
    while True:
        if hint and _State.since is not None and not select.select([reader], [], [], PATIENCE_S)[0]:
            hint = False
            with suppress(OSError):
                os.write(2, b"stopping; press Ctrl-C again to end immediately\n")
        for number in os.read(reader, 64):
            if number not in (signal.SIGINT, *ENDING):
                continue
            if _State.since is None:
                _State.since = time.monotonic()
            elif _State.repeated:
                _State.repeated = False
            elif number == signal.SIGINT and time.monotonic() - _State.since > SAME_PRESS_S:
                _State.at_once.set()
                _end_at_once()


def _end_at_once() -> None:
    """End all descendants, then this process, without any cleanup, which might hang or crash."""
    stopped: set[int] = set()
    while new := _descendants(os.getpid()) - stopped:
        for process in new:  # stopped first, so that none starts another meanwhile
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGSTOP)
        stopped |= new
    for process in stopped:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    for folder in list(_State.folders):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + signal.SIGINT)


def _descendants(root: int) -> set[int]:
    """Ids of all descendants of the process `root`."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    descendants: set[int] = set()
    left = [root]
    while left:
        new = children.get(left.pop(), [])
        descendants.update(new)
        left += new
    return descendants


def _leave() -> None:
    """Skip the interpreter's shutdown after a signal: threads that are still in native code crash in it."""
    if _State.exit_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(_State.exit_code)


def _deliver_again(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook for exceptions that cannot be raised, as in `__del__`: it repeats a signal that was lost there."""

    def hook(unraisable: Any) -> None:
        kind, error = unraisable.exc_type, unraisable.exc_value
        if not issubclass(kind, KeyboardInterrupt | Terminated):
            before(unraisable)
            return
        number = error.exit_code - 128 if isinstance(error, Terminated) else signal.SIGINT
        if number != signal.SIGINT:  # ignored since the first one
            signal.signal(number, _raise_terminated)
        _State.repeated = True
        main = threading.main_thread().ident  # to that thread, so that its wait is interrupted
        threading.Timer(0.05, signal.pthread_kill, (main, number)).start()

    return hook


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated(number)


def drop_closed_streams() -> bool:
    """Point stdout and stderr at /dev/null if their reader or terminal is gone; returns whether one was."""
    dropped = False
    for stream in (1, 2):
        with suppress(OSError):
            poll = select.poll()
            poll.register(stream, select.POLLOUT)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
                dropped = True
    return dropped
