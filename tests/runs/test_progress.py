"""What the screen shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import pty
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finhpc.runs.progress import Progress
from finhpc.runs.result import compare_command
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.journal import Journal

SHOW = """
import logging, sys, time
from finhpc.runs.progress import Progress
from finhpc.training.journal import Journal
journal = Journal(sys.argv[1] + "/journal.jsonl")
with Progress(4, sys.argv[1]):
    for step in range(1, 5):
        journal.write("train", step=step, train_loss=5.0 - step, lr=1e-3, tokens_per_s=12345.6)
    journal.write("message", text="[bold]as it is")
    logging.getLogger("finhpc.x").warning("[bold]logged " + 150 * "x")
    journal.write("eval", step=4, val_loss=5.301)
"""


def _train(step: int, when: float) -> dict[str, object]:
    return {
        "kind": "train",
        "time": when,
        "step": step,
        "train_loss": 5.1234,
        "lr": 9.1e-4,
        "tokens_per_s": 12345.2,
        "grad_norm": None,
    }


def test_plain_lines(tmp_path: Path) -> None:
    screen = io.StringIO()
    progress = Progress(300, tmp_path, screen, line_every_s=3600)
    progress.show([_train(1, 0.0)])
    progress.show([_train(step, 0.5 * step) for step in range(2, 41)])  # too soon for another line
    progress.show([{"kind": "eval", "time": 20.0, "step": 40, "val_loss": 5.301}])
    progress.show([{"kind": "checkpoint", "time": 20.0, "step": 40, "path": "checkpoints/40"}])
    progress.show([_train(41, 20.5)])
    progress._print_line()
    progress.show([{"kind": "message", "time": 20.0, "text": "[a] https://x " + "y" * 300}])
    assert screen.getvalue().splitlines() == [
        "step 1/300  loss 5.123  lr 9.1e-04  12,345 tokens/s",
        "step 40/300  loss 5.123  val 5.301  lr 9.1e-04  12,345 tokens/s  0:02:10 left",
        "checkpoint of step 40: checkpoints/40",
        "step 41/300  loss 5.123  val 5.301 (step 40)  lr 9.1e-04  12,345 tokens/s  0:02:10 left",
        "[a] https://x " + "y" * 300,
    ]


def test_the_first_steps_do_not_estimate_the_time_left(tmp_path: Path) -> None:
    screen = io.StringIO()
    progress = Progress(300, tmp_path, screen, line_every_s=0)
    progress.show([_train(1, 0.0), _train(2, 9.0), _train(3, 10.0)])  # the second step counts memory
    assert "left" not in screen.getvalue()


def _eval(step: int) -> dict[str, object]:
    return {"kind": "eval", "time": 0.0, "step": step, "val_loss": 5.3}


def test_a_step_that_is_evaluated_has_one_line(tmp_path: Path) -> None:
    screen = io.StringIO()
    progress = Progress(5, tmp_path, screen, line_every_s=0, eval_every=2)
    for step in range(1, 6):
        progress.show([_train(step, 0.0)])  # read alone: the evaluation takes its time
        if step in (2, 4, 5):
            progress.show([_eval(step)])
    lines = screen.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == [f"step {step}" for step in range(1, 6)]
    assert all("val 5.300  " in lines[step - 1] for step in (2, 4, 5)), "its own loss, not an earlier step's"


def test_steps_whose_evaluation_never_comes_have_their_lines_too(tmp_path: Path) -> None:
    screen = io.StringIO()
    with Progress(4, tmp_path, screen, line_every_s=0, eval_every=2) as progress:
        progress.show([_train(step, 0.0) for step in range(1, 5)])  # nothing is held out
    assert [line.split("/")[0] for line in screen.getvalue().splitlines()] == [f"step {i}" for i in range(1, 5)]


def _checkpoints(steps: range) -> list[dict[str, object]]:
    return [{"kind": "checkpoint", "time": 0.0, "step": step, "path": f"checkpoints/{step}"} for step in steps]


def test_frequent_checkpoints_do_not_flood_a_log(tmp_path: Path) -> None:
    screen = io.StringIO()
    with Progress(300, tmp_path, screen, checkpoint_line_every_s=3600) as progress:
        for step in range(1, 101):
            progress.show(_checkpoints(range(step, step + 1)))
        assert screen.getvalue() == "checkpoint of step 1: checkpoints/1\n"
    assert screen.getvalue().splitlines()[1:] == ["checkpoint of step 100: checkpoints/100"]


def test_a_checkpoint_that_was_held_back_is_told_in_time(tmp_path: Path) -> None:
    screen = io.StringIO()
    with Progress(300, tmp_path, screen, checkpoint_line_every_s=0.2) as progress:
        progress.show(_checkpoints(range(1, 4)))
        deadline = time.monotonic() + 180
        while "step 3" not in screen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        told = ["checkpoint of step 1: checkpoints/1", "checkpoint of step 3: checkpoints/3"]
        assert screen.getvalue().splitlines() == told
    assert screen.getvalue().splitlines() == told  # nothing was left for the end


def test_a_resumed_run_that_goes_back_shows_no_nonsense(tmp_path: Path) -> None:
    screen = io.StringIO()
    progress = Progress(300, tmp_path, screen, line_every_s=0)
    progress.show([_train(50, 1.0), _train(41, 2.0), _train(42, 3.0), _train(42, 3.0)])
    assert "left" not in screen.getvalue()
    progress.show([_train(step, step - 39.0) for step in range(43, 80)])
    assert screen.getvalue().rstrip().endswith("0:03:41 left")


def test_it_follows_the_journal_from_now_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("message", text="of an earlier attempt")
    screen = io.StringIO()
    with Progress(10, tmp_path, screen):
        journal.write("message", text="from the worker")
        Journal(tmp_path / "driver.jsonl").write("message", text="from the driver")
        deadline = time.monotonic() + 180
        while "driver" not in screen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sorted(screen.getvalue().splitlines()) == ["from the driver", "from the worker"]
        journal.write("message", text="last")
    assert screen.getvalue().splitlines()[-1] == "last"


def test_a_terminal_gets_a_bar_and_stdout_nothing(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.Popen(
        [sys.executable, "-c", SHOW, tmp_path], stderr=theirs, stdout=subprocess.PIPE, text=True, env=env
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    out, _ = done.communicate()
    text = shown.decode()
    assert out == ""
    assert "4/4" in text
    assert "val 5.301" in text
    assert "[bold]as it is" in text
    lines = [line.rsplit("\x1b[2K")[-1].strip() for line in text.splitlines()]
    assert "warning: [bold]logged " + 150 * "x" in lines, "above the bar, on a line of its own"


@pytest.mark.parametrize("uri", [None, "sqlite:////a path/mlflow.db"])
def test_the_command_that_compares_can_be_pasted(uri: str | None) -> None:
    config = build(PretrainConfig, {"run": {"storage": "/my runs; rm", "tracking_uri": uri}})
    words = shlex.split(compare_command(config))
    assert words[1:] == ["ui", *(["--run.tracking_uri", uri] if uri else ["--run.storage", "/my runs; rm"])]
