"""How a command ends when it is told to: in order at first, at once when it is told again.

SIGINT (Ctrl-C) raises `KeyboardInterrupt`, SIGTERM and SIGHUP (a closed terminal) raise `Terminated`, so that what is
open is closed on the way out and the same command resumes. A second Ctrl-C ends the command and every process that it
started, at once: a thread does that, because the main thread may be inside a library that does not return.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import signal
import stat
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, ParamSpec

P = ParamSpec("P")
SAME_PRESS_S = 0.1  # a wrapper such as `uv run` passes a Ctrl-C on that the terminal has sent already
PATIENCE_S = 1.0  # an end in order that takes longer says how to end at once
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived: the run stops here and the same command resumes it."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class _State:
    """Of this process."""

    since: float | None = None  # when it was first told to end
    exit_code: int | None = None  # once it ends for that reason
    watching = False
    interrupts = 0  # that the main thread has seen
    repeated = False  # the next one is no new press of Ctrl-C, but one that was lost
    at_once = threading.Event()
    folders: ClassVar[set[str]] = set()  # removed when it ends at once


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Terminated`, so that workers, run and lock are released in order."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        _leave_closed_terminal()
        raise Terminated(number)

    before: dict[int, Any] = {}
    try:
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: whoever runs it handles signals
        pass
    try:
        yield
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)


@contextmanager
def removed_at_once(folder: str) -> Iterator[None]:
    """Remove `folder` also when the command ends at once meanwhile."""
    _State.folders.add(folder)
    try:
        yield
    finally:
        _State.folders.discard(folder)


def interruptible(main: Callable[P, int]) -> Callable[P, int]:
    """Make a command's `main` end as this module says; its exit code is 128 and the signal's number then."""

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
    """Start what sees signals even while the main thread does not; once in a process."""
    if _State.watching or threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    if (other := signal.set_wakeup_fd(writer, warn_on_full_buffer=False)) != -1:  # of an event loop around us
        signal.set_wakeup_fd(other)
        return
    _State.watching = True
    atexit.register(_leave)  # before any library's own, so that it is called after all of them
    sys.unraisablehook = _deliver_again(sys.unraisablehook)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    threading.Thread(target=_follow, args=(reader,), name="finhpc-signals", daemon=True).start()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """What the main thread does at Ctrl-C; at the second one it only waits for the end, lest it print tracebacks."""
    _State.interrupts += 1
    if _State.interrupts > 1 and _State.at_once.wait(0.5):
        time.sleep(60)
    raise KeyboardInterrupt


def _follow(reader: int) -> None:
    """See every signal as it arrives."""
    hint = True
    while True:
        if hint and _State.since is not None and not select.select([reader], [], [], PATIENCE_S)[0]:
            hint = False
            with suppress(OSError):
                os.write(2, b"stopping in order; Ctrl-C again ends it at once\n")
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
    """End every process that came from this one, then this one: no clean-up, which might hang or crash."""
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
    """Ids of all processes that came from `root`."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found: set[int] = set()
    left = [root]
    while left:
        new = children.get(left.pop(), [])
        found.update(new)
        left += new
    return found


def _leave() -> None:
    """Skip the interpreter's own end after an interruption: threads that were left in native code crash in it."""
    if _State.exit_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(_State.exit_code)


def _deliver_again(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook for exceptions in places that cannot raise, such as `__del__`: an interruption there comes again."""

    def hook(unraisable: Any) -> None:
        kind, error = unraisable.exc_type, unraisable.exc_value
        if not issubclass(kind, KeyboardInterrupt | Terminated):
            before(unraisable)
            return
        number = error.exit_code - 128 if isinstance(error, Terminated) else signal.SIGINT
        if number != signal.SIGINT:  # ignored from the first one on
            signal.signal(number, _raise_terminated)
        _State.repeated = True
        main = threading.main_thread().ident  # to that thread, so that what it waits in is interrupted
        threading.Timer(0.05, signal.pthread_kill, (main, number)).start()

    return hook


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated(number)


def _leave_closed_terminal() -> None:
    """Send what is still to be written nowhere, where its terminal is gone: writing would fail."""
    for stream in (1, 2):
        with suppress(OSError, termios.error):
            if not os.path.samestat(os.fstat(stream), os.stat(os.devnull)) and _is_gone(stream):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def _is_gone(stream: int) -> bool:
    """Whether a stream is a terminal that was closed: a character device that no longer answers as one."""
    if not stat.S_ISCHR(os.fstat(stream).st_mode):
        return False
    try:
        termios.tcgetattr(stream)
    except termios.error:
        return True
    return False
