"""A storm: a run is hurt in every way of a list, at random, for as long as asked, and ends like a calm run.

    python -m tests.runs.storm --seconds 3600 --seed 1 --folder /tmp/storm

Real processes, real files, a real MLflow server. What was done to the run and how long it then made
no new step is written to FOLDER/storm.jsonl and shown as a table at the end. Then a calm run of
as many steps is made, and every loss, gradient norm, validation loss and consumed sample must be the
same, bit for bit; MLflow must have every step's loss.

The learning rate is constant, so that a run can be made longer (`train.steps`) until the time is up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from finhpc.commands import ui
from finhpc.training.checkpoint import MANIFEST, list_complete
from finhpc.training.journal import read
from tests.runs.runs import command, last_words, outcome, ray_process, train_workers
from tests.tiny import tiny_shards

HANG_S = 20
FLAGS = [
    *("--model.preset", "gpt2-tiny", "--model.layers", "4", "--model.width", "128", "--model.context", "64"),
    *("--model.dropout", "0", "--method.rank", "16", "--data.seq_len", "64", "--data.eval_samples", "16"),
    *("--optimizer.min_lr_ratio", "1", "--parallel.stages", "2", "--parallel.micro_batch_size", "8"),
    *("--parallel.micro_batches", "4", "--train.eval_every", "50", "--train.checkpoint_every", "20"),
    *("--train.keep_checkpoints", "3", "--train.hang_timeout_s", str(HANG_S), "--run.max_failures", "100000"),
]
PATIENCE_S = 300  # a run that gains no new ground for so long is lost


class Storm:
    """One run in the storm: its command, started again and again, and what is done to it."""

    def __init__(self, folder: Path, shards: Path, seed: int, chunk: int) -> None:
        self.folder, self.shards, self.random, self.chunk = folder, shards, random.Random(seed), chunk
        self.run = folder / "run"
        self.steps = chunk
        self.newest = self.offset = self.trained = 0  # highest step; bytes read; train records
        self.gains = [time.time()]  # when each step was taken for the first time
        self.events: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.server: subprocess.Popen[bytes] | None = None

    # -- the command --------------------------------------------------------------------------

    def start(self) -> None:
        self._stack.close()
        uri = f"http://127.0.0.1:{self.port}"
        more = ("--train.steps", str(self.steps), "--run.tracking_uri", uri)
        self.process = self._stack.enter_context(command(self.folder, self.shards, *more, flags=FLAGS))

    def alive(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def end(self, number: signal.Signals) -> None:
        """Send the command a signal and wait until it, its workers and its Ray are gone.

        Not for Ray's agents: they look for their dead cluster for a minute before they end.
        """
        process = self.alive()
        family = [] if process.poll() is not None else work_of(process)
        if process.poll() is None:
            process.send_signal(number)
        self.wait_exit(90)
        _, left = psutil.wait_procs(family, timeout=30)
        for orphan in left:
            self.problem(f"{orphan} outlived its command by 30 s after {number.name}")
            orphan.kill()

    def wait_exit(self, timeout_s: float) -> int:
        process = self.alive()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.problem(f"the command did not end within {timeout_s:.0f} s")
            process.kill()
            return process.wait()

    def look(self) -> int:
        """Read what the run reported since; returns the highest step."""
        while True:
            records, offset = read(self.run / "journal.jsonl", self.offset, limit=1000)
            if offset == self.offset:
                return self.newest
            for record in records:
                if record["kind"] == "train":
                    self.trained += 1
                    if record["step"] > self.newest:
                        self.newest = record["step"]
                        self.gains.append(record["time"])
            self.offset = offset

    def keep_going(self) -> None:
        """Start a run that ended: one that finished is made longer; one that failed by itself is a problem."""
        code = self.alive().poll()
        if code is None:
            return
        if code == 0:
            self.steps += self.chunk
        else:
            self.problem(f"the command ended with {code} by itself: {self.last_words()}")
        self.start()

    def wait_for_new_ground(self) -> None:
        """Wait until a step beyond all before was taken."""
        begin, before = time.monotonic(), self.look()
        while self.look() <= before:
            self.keep_going()
            if time.monotonic() - begin > PATIENCE_S:
                self.problem(f"no step beyond {before} within {PATIENCE_S} s: {self.last_words()}")
                self.end(signal.SIGKILL)
                self.start()
                begin = time.monotonic()
            time.sleep(0.05)

    def last_words(self) -> str:
        return last_words(self.folder)[-600:]

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.log(problem=text)

    def log(self, **event: Any) -> None:
        event = {"at": time.strftime("%H:%M:%S"), "step": self.newest, **event}
        self.events.append(event)
        with open(self.folder / "storm.jsonl", "a") as file:
            file.write(json.dumps(event) + "\n")
        print(json.dumps(event), file=sys.stderr, flush=True)

    def workers(self) -> list[psutil.Process]:
        """The workers once they train (a start that is still under way has none, or is not worth hurting)."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if len(found := train_workers(self.alive())) == 2:
                return found
            self.keep_going()
            time.sleep(0.1)
        raise AssertionError(f"no workers: {self.last_words()}")

    # -- MLflow ---------------------------------------------------------------------------------

    def serve(self) -> None:
        words = ui.server_command(f"sqlite:///{self.folder}/mlflow.db", self.port)
        with open(self.folder / "server.log", "ab") as log:
            self.server = subprocess.Popen(
                words, env=ui.server_environment(), stdout=log, stderr=log, start_new_session=True
            )

    def signal_server(self, number: signal.Signals) -> None:
        assert self.server is not None
        with suppress(ProcessLookupError):
            os.killpg(self.server.pid, number)
        if number == signal.SIGKILL:
            self.server.wait()

    def close(self) -> None:
        self._stack.close()
        if self.server is not None:
            self.signal_server(signal.SIGKILL)

    def unsaved(self, complete_wanted: bool) -> None:
        """Wait for the next checkpoint: until its folder is there, or until its manifest is."""
        folder = self.run / "checkpoints"
        known = set(folder.glob("step_*"))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for path in set(folder.glob("step_*")) - known:
                if not complete_wanted or (path / MANIFEST).exists():
                    return
            time.sleep(0.0005)
            self.keep_going()


def work_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The command's workers, and those processes of its Ray that keep them going."""
    rays = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() in ("raylet", "gcs_server")]
    return [*train_workers(process), *rays]


# -- faults: each hurts the run, and starts the command again where it ended it ------------------------


def worker_killed(storm: Storm) -> None:
    storm.random.choice(storm.workers()).kill()


def worker_killed_in_a_save(storm: Storm) -> None:
    victim = storm.random.choice(storm.workers())
    storm.unsaved(complete_wanted=False)
    victim.kill()


def worker_killed_after_a_save(storm: Storm) -> None:
    victim = storm.random.choice(storm.workers())
    storm.unsaved(complete_wanted=True)
    victim.kill()


def worker_hangs(storm: Storm) -> None:
    victim = storm.random.choice(storm.workers())
    victim.suspend()
    _, left = psutil.wait_procs([victim], timeout=8 * HANG_S)
    if left:
        storm.problem("a hung worker was not removed")
        victim.kill()


def command_killed(storm: Storm) -> None:
    storm.end(signal.SIGKILL)
    storm.start()


def command_terminated(storm: Storm) -> None:
    storm.end(signal.SIGTERM)
    storm.start()


def all_paused(storm: Storm) -> None:
    """Everything stands still for some seconds, as on a machine that sleeps, and goes on."""
    family = [*psutil.Process(storm.alive().pid).children(recursive=True), psutil.Process(storm.alive().pid)]
    for process in family:
        with suppress(psutil.Error):
            process.suspend()
    time.sleep(5)
    for process in reversed(family):
        with suppress(psutil.Error):
            process.resume()


def _damage(storm: Storm, hurt: Callable[[Path], None]) -> None:
    storm.end(signal.SIGKILL)
    found = list_complete(storm.run / "checkpoints")
    if len(found) > 1:
        hurt(found[0].path)
    storm.start()


def checkpoint_cut(storm: Storm) -> None:
    def hurt(path: Path) -> None:
        file = storm.random.choice(sorted(path.glob("*.safetensors")))
        os.truncate(file, storm.random.randrange(file.stat().st_size))

    _damage(storm, hurt)


def checkpoint_flipped(storm: Storm) -> None:
    def hurt(path: Path) -> None:
        file = storm.random.choice(sorted(path.glob("*.safetensors")))
        content = bytearray(file.read_bytes())
        content[storm.random.randrange(len(content))] ^= 1 << storm.random.randrange(8)
        file.write_bytes(content)

    _damage(storm, hurt)


def checkpoint_deleted(storm: Storm) -> None:
    _damage(storm, lambda path: storm.random.choice(sorted(path.iterdir())).unlink())


def manifest_cut(storm: Storm) -> None:
    def hurt(path: Path) -> None:
        os.truncate(path / MANIFEST, storm.random.randrange((path / MANIFEST).stat().st_size))

    _damage(storm, hurt)


def rays_record_cut(storm: Storm) -> None:
    storm.end(signal.SIGKILL)
    for attempt in (storm.run / "ray").iterdir():
        if attempt.is_dir():
            (attempt / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')
    storm.start()


def raylet_killed(storm: Storm) -> None:
    _ray_dies(storm, "raylet")


def gcs_killed(storm: Storm) -> None:
    _ray_dies(storm, "gcs_server")


def _ray_dies(storm: Storm, name: str) -> None:
    ray_process(storm.alive(), name).kill()
    if (code := storm.wait_exit(120)) != 1:
        storm.problem(f"{name} killed: the command ended with {code}: {storm.last_words()}")
    storm.end(signal.SIGKILL)  # whatever it left
    storm.start()


def disk_full(storm: Storm) -> None:
    """No file may grow any more: as on a full disk, the write fails (EFBIG in place of ENOSPC)."""
    for worker in storm.workers():
        with suppress(psutil.Error):
            worker.rlimit(psutil.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    if (code := storm.wait_exit(120)) != 1:
        storm.problem(f"disk full: the command ended with {code}: {storm.last_words()}")
    storm.start()


def tracking_down(storm: Storm) -> None:
    storm.signal_server(signal.SIGKILL)
    time.sleep(storm.random.uniform(5, 15))
    storm.serve()


def tracking_slow(storm: Storm) -> None:
    storm.signal_server(signal.SIGSTOP)
    time.sleep(storm.random.uniform(5, 15))
    storm.signal_server(signal.SIGCONT)


FAULTS: dict[str, Callable[[Storm], None]] = {
    fault.__name__: fault
    for fault in (
        *(worker_killed, worker_killed_in_a_save, worker_killed_after_a_save, worker_hangs, all_paused),
        *(command_killed, command_terminated, checkpoint_cut, checkpoint_flipped, checkpoint_deleted, manifest_cut),
        *(rays_record_cut, raylet_killed, gcs_killed, disk_full, tracking_down, tracking_slow),
    )
}


def storm(
    folder: Path, seconds: float, seed: int, gap: tuple[float, float], chunk: int, names: Sequence[str] = ()
) -> Storm:
    """Hurt one run for `seconds`, let it finish, make the calm run, compare. Problems are in the result's list."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = tiny_shards(folder / "shards", blocks=1024)
    it = Storm(folder, shards, seed, chunk)
    try:
        it.serve()
        it.start()
        it.log(begin=seed, seconds=seconds)
        it.wait_for_new_ground()
        deadline, deck = time.monotonic() + seconds, list[str]()
        while time.monotonic() < deadline:
            pause = time.monotonic() + it.random.uniform(*gap)
            while time.monotonic() < pause:
                it.look()
                it.keep_going()
                time.sleep(0.1)
            if not deck:  # every fault once before any twice
                deck = it.random.sample(names or list(FAULTS), len(names or FAULTS))
            hurt(it, deck.pop())
        it.log(calm_from_here=it.steps)
        while it.wait_exit(600 + it.chunk) != 0:  # the last stretch, undisturbed
            it.problem(f"the undisturbed end failed: {it.last_words()}")
            it.start()
        it.look()
        compare(it)
    finally:
        it.close()
    return it


def hurt(it: Storm, name: str) -> None:
    """One fault; what it cost is the longest time without a new step, and the steps trained twice."""
    before, trained, first = it.look(), it.trained, len(it.gains) - 1
    FAULTS[name](it)
    it.wait_for_new_ground()
    pause = max(after - earlier for earlier, after in pairwise(it.gains[first:]))
    repeated = it.trained - trained - (it.newest - before)
    it.log(fault=name, at_step=before, pause_s=round(pause, 1), repeated_steps=repeated)


def compare(it: Storm) -> None:
    """Make the calm run of as many steps; whatever is not the same is a problem."""
    from mlflow import MlflowClient

    calm_folder = it.folder / "calm"
    (calm_folder / "run").mkdir(parents=True)
    shutil.copy(it.run / "stages.json", calm_folder / "run")  # runs are bit-equal over the same stages alone
    begin = time.monotonic()
    with command(calm_folder, it.shards, "--train.steps", str(it.steps), flags=FLAGS) as process:
        if (code := process.wait()) != 0:
            it.problem(f"the calm run ended with {code}: {(calm_folder / 'stderr').read_text()[-600:]}")
            return
    it.log(calm_run_s=round(time.monotonic() - begin, 1), steps=it.steps)
    hurt_run, calm = outcome(it.folder), outcome(calm_folder)
    if len(calm["train"]) != it.steps:
        it.problem(f"the calm run has {len(calm['train'])} steps, not {it.steps}")
    for what in ("train", "norms"):
        if hurt_run[what] != calm[what]:
            different = [step for step, value in calm[what].items() if hurt_run[what].get(step) != value]
            it.problem(f"{what} differs at {len(different)} steps, first {different[:3]}")
    # A run that was made longer evaluated at its former ends too.
    common = {step: hurt_run["eval"].get(step) for step in calm["eval"]}
    if common != calm["eval"]:
        it.problem(f"validation losses differ: {common} and {calm['eval']}")
    if hurt_run["consumed"] != calm["consumed"]:
        it.problem(f"consumed_sha256 differs: {hurt_run['consumed']} and {calm['consumed']}")
    result = json.loads((it.run / "result.json").read_text())
    client = MlflowClient(f"sqlite:///{it.folder}/mlflow.db")
    history = {point.step: point.value for point in client.get_metric_history(result["mlflow_run_id"], "train_loss")}
    if history != calm["train"]:
        it.problem(f"MLflow has {len(history)} of {it.steps} steps, or other losses")


def table(it: Storm) -> str:
    by_fault: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in it.events:
        if "fault" in event:
            by_fault[event["fault"]].append(event)
    lines = [f"{'fault':28} {'count':>5} {'median pause s':>14} {'longest':>8} {'steps repeated':>14}"]
    for name in sorted(by_fault):
        took = [event["pause_s"] for event in by_fault[name]]
        again = sum(event["repeated_steps"] for event in by_fault[name])
        lines.append(f"{name:28} {len(took):5} {statistics.median(took):14.1f} {max(took):8.1f} {again:14}")
    faults = sum(map(len, by_fault.values()))
    lines.append(
        f"{faults} faults, {it.steps} steps, {it.trained - it.newest} of them repeated; {len(it.problems)} problems"
    )
    return "\n".join(lines + it.problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FINHPC_STORM_S", "150")))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gap", type=float, nargs=2, default=(20, 40), help="seconds between faults: from, to")
    parser.add_argument("--chunk", type=int, default=4000, help="steps by which the run is made longer")
    parser.add_argument("--faults", default=",".join(FAULTS), help="names, separated by commas")
    parser.add_argument("--folder", type=Path)
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it started
    folder = words.folder or Path(tempfile.mkdtemp(prefix="finhpc-storm-"))
    it = storm(folder, words.seconds, words.seed, tuple(words.gap), words.chunk, words.faults.split(","))
    print(table(it))
    print(f"everything is in {folder}")
    return 1 if it.problems else 0


if __name__ == "__main__":
    sys.exit(main())
