"""The verbs that a reproduction is made of: their settings, their functions, and what their results will hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from finhpc.settings.base import Section


@dataclass(frozen=True)
class Verb:
    """`name`: of its settings, module:class. `function`: module:function.

    `gives`: what later steps may name of its result, as it stands before the step has run; ./PATH lies in its folder.
    """

    name: str
    function: str
    gives: dict[str, Any]

    def settings(self) -> type[Section]:
        module, _, name = self.name.partition(":")
        found: type[Section] = getattr(import_module(module), name)
        return found

    def work(self) -> Callable[[Any], dict[str, Any]]:
        module, _, name = self.function.partition(":")
        found: Callable[[Any], dict[str, Any]] = getattr(import_module(module), name)
        return found

    def foretold(self, folder: Path) -> dict[str, Any]:
        """What later steps may name, before the step has run."""
        return {key: str(folder / value) if str(value).startswith(".") else value for key, value in self.gives.items()}


TRAINED = {"model": "./model", "mlflow_run_id": "its run"}

SETTINGS = "finhpc.settings."
VERBS = {
    "prepare": Verb(f"{SETTINGS}prepare:PrepareConfig", "finhpc.commands.prepare:prepare", {"out": "."}),
    "pretrain": Verb(f"{SETTINGS}pretrain:PretrainConfig", "finhpc.commands.pretrain:pretrain", TRAINED),
    "decompose": Verb(
        "finhpc.settings.decompose:DecomposeConfig", "finhpc.commands.decompose.command:decompose", {"model": "."}
    ),
    "hold_out": Verb(
        "finhpc.settings.reproduce:HoldOutConfig", "finhpc.evaluation.hold_out:hold_out", {"files": {}, "tasks": []}
    ),
    "finetune": Verb(f"{SETTINGS}finetune:FinetuneConfig", "finhpc.commands.finetune:finetune", TRAINED),
    "evaluate": Verb(
        "finhpc.settings.evaluate:EvaluateConfig",
        "finhpc.commands.evaluate.command:evaluate",
        {"mlflow_run_id": "its run"},
    ),
    "measure": Verb(f"{SETTINGS}reproduce:MeasureConfig", "finhpc.commands.reproduce.measure:measure", {}),
    "report": Verb(f"{SETTINGS}report:ReportConfig", "finhpc:report", {}),
}
