"""The folder of one run: its lock, its settings and its result.

    config.yaml           the resolved settings, so that the folder can rerun itself
    environment.json      versions, git commit, command line
    identity.json         fingerprints of the dataset and of the model that training starts from
    journal.jsonl         events of the training; driver.jsonl: those of the command
    mlflow.json           how much of the run was sent to MLflow
    checkpoints/          see `finhpc.training.checkpoint`
    model/                the trained model or adapter, once the last step is taken
    result.json           the result

and, for some runs or for a time:

    stages.json           how the model was cut into stages
    decomposed/           the factors of a dense model that training starts from
    sample-losses.csv     the trained model's loss on each of `data.final_samples`
    examples.safetensors  the tokenized examples of a finetuning
    quantized             a link to the base that a sweep quantized for its trials
    stacks/               where the threads of a worker that hung stood
    ray/                  Ray Train's own records
    fatal.json            an error that ended all workers; out-of-memory.json: the step of an earlier one
    .lock, .room          the lock, and space to report a full disk
    .stop                 a byte in it asks the workers to save a checkpoint and return

Every file except the journals is replaced as a whole or not at all. None contains passwords.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from finhpc.errors import ConfigError
from finhpc.files import lock, private_folder, redact, write_atomic, write_json
from finhpc.settings.base import build, flatten, marked, to_yaml
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import TrainingConfig

PACKAGES = ("finhpc", "torch", "ray", "deepspeed", "transformers", "tokenizers", "mlflow", "numpy", "pyarrow")
# Files that a run folder may have before its work begins.
BEFORE_WORK = {".lock", ".room", ".stop", "config.yaml", "environment.json", "identity.json", "tasks"}
RESERVED = ("mlflow.db", "mlartifacts")  # next to the run folders in the storage
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SECRET_WORDS = {"password", "passwd", "secret", "token", "key", "apikey", "credential", "credentials", "auth"}


class RunFolder:
    """`storage/name`, created when it is first locked."""

    def __init__(self, storage: str | Path, name: str) -> None:
        if not _NAME.fullmatch(name) or name in RESERVED:
            raise ConfigError(
                f"run.name={name!r} cannot name a run folder; use up to 128 letters, digits, '.', '_' and '-', "
                f"starting with a letter or digit, and none of {', '.join(RESERVED)}."
            )
        self.name = name
        self.path = Path(os.path.abspath(Path(storage).expanduser())) / name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run against other processes; the kernel releases the lock when this process dies.

        A new folder without results is removed if a `ConfigError` ends the block.
        """
        new = [path for path in (self.path, self.path.parent) if not path.exists()]
        try:
            private_folder(self.path)
        except OSError as error:
            raise ConfigError(
                f"run.storage={self.path.parent} cannot contain the run folder {self.name} ({error.strerror}); "
                f"choose a folder you may write to."
            ) from None
        with lock(self.path / ".lock", f"run.name={self.name}", "choose another run.name"):
            try:
                yield
            except ConfigError:
                if self.path in new and {path.name for path in self.path.iterdir()} <= BEFORE_WORK:
                    shutil.rmtree(self.path)
                    with suppress(OSError):  # the storage holds other runs
                        new[-1].rmdir()
                raise

    def write_config(
        self, config: TrainingConfig, dataset_fingerprint: str | None = None, model_fingerprint: str | None = None
    ) -> None:
        self.write_settings(config)
        identity = {"dataset_fingerprint": dataset_fingerprint, "model_fingerprint": model_fingerprint}
        self._write_json("identity.json", identity)

    def write_settings(self, config: Any) -> None:
        """Write the settings of a command that has a section `run`."""
        uri = config.run.tracking_uri
        run = config.run.model_copy(update={"tracking_uri": uri and redact(uri)})
        write_atomic(self.path / "config.yaml", to_yaml(config.model_copy(update={"run": run})))

    def write_environment(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Write and return the versions, git commit and command line."""
        values = environment(sys.argv if argv is None else argv)
        self._write_json("environment.json", values)
        return values

    def check_resume(
        self, config: TrainingConfig, dataset_fingerprint: str | None = None, model_fingerprint: str | None = None
    ) -> None:
        """Raise one `ConfigError` with every setting that differs and would make this another run."""
        path = self.path / "config.yaml"
        if not path.exists():
            return
        before = build(type(config), yaml.safe_load(path.read_text(encoding="utf-8")))
        problems = _differences(before, config)
        identity = self._read_json("identity.json") or {}
        old_model, old_data = identity.get("model_fingerprint"), identity.get("dataset_fingerprint")
        if old_model != model_fingerprint:
            problems.append(
                f"model.path={config.model.path} (fingerprint {_short(model_fingerprint)}) is not the model that the "
                f"run started from ({_short(old_model)}, {before.model.path}); use another run.name or restore it."
            )
        if old_data and dataset_fingerprint and old_data != dataset_fingerprint:
            problems.append(
                f"{_data(config)} has other data (fingerprint {dataset_fingerprint[:12]}) than the "
                f"run was trained on ({old_data[:12]}, {_data(before)}); use another run.name or restore the data."
            )
        if problems:
            raise ConfigError(problems)

    def write_result(self, result: Mapping[str, Any]) -> None:
        self._write_json("result.json", result)

    def result(self) -> dict[str, Any] | None:
        return self._read_json("result.json")

    def is_finished(self, steps: int) -> bool:
        """Whether the run finished, with at least `steps` steps or early because its evaluations got no better."""
        result = self.result()
        if result is None or result["status"] != "finished":
            return False
        return bool(result.get("stopped_early")) or result["steps"] >= steps

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.path / name, value, indent=2)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(
                f"{path} is not valid JSON ({error}); restore it, or delete it to continue without it."
            ) from None
        return value


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """Versions, git commit and command line of this process."""
    return {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        **_git(),
        "command": _without_secrets(argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _differences(before: TrainingConfig, now: TrainingConfig) -> list[str]:
    old, new = flatten(before), flatten(now)
    old["samples per step (micro_batch_size x micro_batches x replicas)"] = before.parallel.samples_per_step
    new["samples per step (micro_batch_size x micro_batches x replicas)"] = now.parallel.samples_per_step
    kinds = [config.method.kind for config in (before, now) if isinstance(config, PretrainConfig)]
    if kinds == ["blend", "blend"]:  # alpha must have been what it would be now
        key = "the step at which W is gone (method.blend_share x train.steps)"
        shares = (old["method.blend_share"], new["method.blend_share"])
        old[key], new[key] = (round(a * c.train.steps) for a, c in zip(shares, (before, now), strict=True))
    problems, may_change = [], marked(type(now), "may_change")
    for key, value in new.items():
        if old[key] == value or key in may_change:
            continue
        if key == "train.steps":  # the cosine schedule spans them: more steps stretch what is left of it
            if value < old[key]:
                problems.append(
                    f"train.steps was {old[key]} in the run's config, now {value}; a run can only be made longer: "
                    f"use {old[key]} or more, or another run.name."
                )
            continue
        problems.append(f"{key} was {old[key]} in the run's config, now {value}; use another run.name or restore it.")
    return problems


def _data(config: TrainingConfig) -> str:
    if isinstance(config, PretrainConfig):
        return f"data.shards={config.data.shards}"
    return f"data.source={', '.join(config.data.source)}"


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "none"


def _git() -> dict[str, Any]:
    """Commit of the checkout that finhpc runs from, otherwise of the working directory; None if neither has one."""
    here = Path(__file__).resolve()
    # A virtual environment inside some other checkout is not that checkout: the file must be tracked.
    tracked = _run_git(here.parent, "ls-files", "--error-unmatch", here.name) is not None
    folder = here.parent if tracked else Path.cwd()
    if commit := _run_git(folder, "rev-parse", "HEAD"):
        return {"git_commit": commit, "git_dirty": bool(_run_git(folder, "status", "--porcelain"))}
    return {"git_commit": None, "git_dirty": None}


def _run_git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _without_secrets(argv: Sequence[str]) -> list[str]:
    """The command line; the value of a flag whose name suggests a secret becomes ***."""
    words: list[str] = [Path(argv[0]).name] if argv else []
    hide_next = False
    for word in argv[1:]:
        name, equals, _ = word.partition("=")
        secret = not _SECRET_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))
        if hide_next and not word.startswith("--"):
            words.append("***")
        else:
            words.append(f"{name}=***" if secret and equals else redact(word))
        hide_next = secret and not equals and word.startswith("-")
    return words


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
