"""What the trials of a sweep share, made once: the dense model they start from, and its factors at each rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from finhpc.config import PretrainConfig, SweepConfig
from finhpc.errors import FinhpcError
from finhpc.lowrank.registry import STARTED
from finhpc.orchestration.runfolder import RunFolder
from finhpc.orchestration.start import DECOMPOSED, decompose_start, needs_decomposing
from finhpc.orchestration.sweep_plan import REFERENCE, Planned
from finhpc.orchestration.trial import outcome_of

Say = Callable[[str], None]


def prepare_shared(plan: Planned, say: Say) -> None:
    """Train the dense reference where trials start from it, and factorise once what several would."""
    if not isinstance(plan.config, SweepConfig):
        return
    if plan.reference is not None:
        _train_reference(plan, say)
    for trial in plan.trials:
        run = plan.run_folder(trial.name)
        config = plan.config_of(trial)
        if "status" in outcome_of(run) or not isinstance(config, PretrainConfig) or not needs_decomposing(config):
            continue
        shared = plan.shared / f"decomposed-{_key(config)}"
        if not (shared / DECOMPOSED / "result.json").is_file():
            say(f"factorising the dense model for {trial.name} and those of its rank")
        decompose_start(config, shared)
        run.mkdir(parents=True, exist_ok=True)
        if not (run / DECOMPOSED).exists():
            (run / DECOMPOSED).symlink_to(shared / DECOMPOSED)


def _train_reference(plan: Planned, say: Say) -> None:
    from finhpc.orchestration.pretrain import pretrain

    assert plan.reference is not None
    run = plan.reference
    before = RunFolder(run.run.storage, run.run.name).result()
    if before and before["status"] == "finished" and before["steps"] >= run.train.steps:
        return
    say(f"the dense model that {' and '.join(STARTED)} start from, trained once: {plan.reference.run.name}")
    try:
        pretrain(run)
    except FinhpcError as error:
        raise type(error)(f"the dense reference {REFERENCE} of the sweep: {error}") from None


def _key(config: PretrainConfig) -> str:
    """The same for trials that start from the same factors."""
    method = config.method
    said: list[Any] = [config.model.path, method.rank, sorted(method.ranks.items()), method.embedding, method.head]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
