"""How a command ends when it is interrupted: processes of their own, with signals as a terminal sends them."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_until

HEAD = """
import hashlib, os, subprocess, sys, time
from pathlib import Path
from finhpc.interrupts import interruptible, removed_at_once
ready = Path(sys.argv[1])

def is_ready(): (ready / "ready").touch()
"""

# A child of its own, and a main thread inside native code, which no Python handler reaches.
NATIVE = """
@interruptible
def main():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(400)"])
    (ready / "scratch").mkdir()
    with removed_at_once(str(ready / "scratch")):
        (ready / "child").write_text(str(child.pid))
        is_ready()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    return 0
sys.exit(main())
"""

# The first interruption arrives where Python cannot raise it.
LOST = """
class Slow:
    def __del__(self):
        is_ready()
        time.sleep(3)

@interruptible
def main():
    slow = Slow()
    del slow
    time.sleep(400)
    return 0
sys.exit(main())
"""

ORDERLY = """
@interruptible
def main():
    try:
        is_ready()
        time.sleep(400)
    finally:
        print("closing what is open", file=sys.stderr, flush=True)
        (ready / "closed").touch()
    return 0
sys.exit(main())
"""


def begin(code: str, folder: Path, *arguments: str, **more: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HEAD + code, str(folder), *arguments]
    # A shell's background job ignores SIGINT, and its children would, too.
    more.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True, **more)  # type: ignore[call-overload]
    wait_until((folder / "ready").exists)
    return process  # type: ignore[no-any-return]


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path) -> None:
    process = begin(NATIVE, tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the main thread is where no handler runs"
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 130
    assert process.communicate()[1] == "", "no traceback"
    with suppress(psutil.NoSuchProcess):  # killed, but perhaps not yet collected by the system
        assert psutil.Process(int((tmp_path / "child").read_text())).status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "scratch").exists()


def test_a_ctrl_c_that_a_wrapper_passes_on_is_no_second_one(tmp_path: Path) -> None:
    process = begin(ORDERLY, tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    assert process.wait(180) == 130
    assert (tmp_path / "closed").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_that_got_lost_comes_again(tmp_path: Path, number: int, code: int) -> None:
    process = begin(LOST, tmp_path)
    process.send_signal(number)
    assert process.wait(180) == code
    assert "Exception ignored" not in process.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_one_closes_what_is_open(tmp_path: Path, number: int) -> None:
    process = begin(ORDERLY, tmp_path)
    process.send_signal(number)
    assert process.wait(180) == 128 + number
    assert process.communicate()[1] == "closing what is open\n"


# Work in a thread that is asked to end, which takes it a moment, or for ever.
ASKED = """
import ray  # now: the end of `watch` would take a moment for it, and hide that it did not wait
from finhpc.interrupts import Terminated, terminable
from finhpc.runs.watch import watch
asked = ready / "asked"

def work():
    is_ready()
    while not asked.exists() or "for ever" in sys.argv:
        time.sleep(0.02)
    time.sleep(0.3)
    (ready / "saved").touch()

def ask_to_end():
    asked.touch()
    return 200.0

@interruptible
def main():
    watch(work, lambda: None, ask_to_end)
    return 0
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_work_that_is_asked_to_end_may_save_first(number: int, tmp_path: Path) -> None:
    process = begin(ASKED, tmp_path)
    process.send_signal(number)
    assert process.wait(180) == 128 + number
    assert (tmp_path / "saved").exists()


def test_a_second_sigterm_waits_for_no_save(tmp_path: Path) -> None:
    process = begin(ASKED, tmp_path, "for ever")
    process.send_signal(signal.SIGTERM)
    wait_until((tmp_path / "asked").exists)
    process.send_signal(signal.SIGTERM)  # a wrapper repeats the first one
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not (tmp_path / "saved").exists()


def test_nohup_keeps_a_command_going(tmp_path: Path) -> None:
    process = begin(ORDERLY, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.kill()
    process.communicate()


def test_a_closed_terminal_does_not_keep_a_command_from_ending_in_order(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", HEAD + ORDERLY, str(tmp_path)])
    wait_until((tmp_path / "ready").exists)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert (tmp_path / "closed").exists(), "though there was nowhere to print to"
