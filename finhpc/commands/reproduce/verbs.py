"""The commands that a reproduction is made of, and what later steps may name of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finhpc.commands import COMMANDS, Command

TRAINED = {"model": "./model", "mlflow_run_id": "its run"}
# Command -> the keys of its result that later steps may name, as they are before it has run; ./PATH is in its folder.
RESULTS: dict[str, dict[str, Any]] = {
    "prepare": {"out": "."},
    "pretrain": TRAINED,
    "decompose": {"model": "."},
    "hold_out": {"files": {}, "tasks": []},
    "finetune": TRAINED,
    "evaluate": {"mlflow_run_id": "its run"},
    "measure": {},
    "report": {},
}
HOLD_OUT: Command[Any] = Command(
    "hold_out",
    "write the examples that a finetuning holds out as task files",
    "finhpc.settings.reproduce:HoldOutConfig",
    "finhpc.evaluation.hold_out:hold_out",
    dry_run=None,
)
MEASURE: Command[Any] = Command(
    "measure",
    "measure sizes and the speed of generation",
    "finhpc.settings.reproduce:MeasureConfig",
    "finhpc.commands.reproduce.measure:measure",
    dry_run=None,
)
VERBS = {name: {"hold_out": HOLD_OUT, "measure": MEASURE}.get(name) or COMMANDS[name] for name in RESULTS}


def expected_result(name: str, folder: Path) -> dict[str, Any]:
    """What later steps may name of a step in `folder` that has not run yet."""
    return {key: str(folder / value) if str(value).startswith(".") else value for key, value in RESULTS[name].items()}
