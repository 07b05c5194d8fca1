"""Run work that waits for Ray in a thread, so that this one notices signals and processes of Ray's that died."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from finhpc.cluster.connect import dead_process
from finhpc.errors import TrainingFailedError
from finhpc.interrupts import Terminated, terminable_again

log = logging.getLogger(__name__)

POLL_S = 0.2


def check_ray(then: str) -> None:
    """Raise `TrainingFailedError` if a process of Ray's own died, which Ray notices late or never.

    `then`: the end of the message, with what follows from it and what to do.
    """
    if name := dead_process():
        # Now: Ray may end this process before the error is shown.
        log.info(f"Ray's process {name} died; stopping.")
        raise TrainingFailedError(f"Ray's process {name} died (killed, or out of memory?){then}")


def watch(
    work: Callable[[], object],
    poll: Callable[[], bool | None],
    then: str,
    ask_to_end: Callable[[], float] = lambda: 0.0,
    end: Callable[[threading.Thread, threading.Event], None] = lambda thread, ended: None,
) -> Exception | None:
    """Run `work` in a thread until it ends or `poll` returns True; return the exception it raised.

    On SIGTERM and SIGHUP `ask_to_end` is called; `work` then has as many seconds as that returns to end by itself,
    unless another signal comes. The main thread stays free for signals: a handler that raises inside Ray's own waiting
    is swallowed there. `poll` may raise, and `check_ray` does, with `then`. At the end, `end` is called with the thread
    and the event of its end: it may end `work`.
    """
    raised: list[Exception] = []
    ended = threading.Event()  # a signal in `Thread.join` makes Python 3.11 believe that the thread has ended

    def run() -> None:
        try:
            work()
        except Exception as error:
            raised.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, daemon=True, name="finhpc-ray")
    thread.start()
    try:
        while not ended.wait(POLL_S):
            if poll():
                return None
            check_ray(then)
    except Terminated:
        with terminable_again():
            deadline = time.monotonic() + ask_to_end()
            while time.monotonic() < deadline and dead_process() is None and not ended.wait(POLL_S):
                pass
        raise
    finally:
        end(thread, ended)
    return raised[0] if raised else None
