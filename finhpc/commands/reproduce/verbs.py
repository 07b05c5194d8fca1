"""The verbs that a reproduction is made of: their settings, their functions, and what their results will hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from finhpc import settings as config
from finhpc.settings import Section


@dataclass(frozen=True)
class Verb:
    """`name`: of its settings in finhpc.settings. `function`: module:function.

    `gives`: what later steps may name of its result, as it stands before the step has run; ./PATH lies in its folder.
    """

    name: str
    function: str
    gives: dict[str, Any]

    def settings(self) -> type[Section]:
        found: type[Section] = getattr(config, self.name)
        return found

    def work(self) -> Callable[[Any], dict[str, Any]]:
        module, _, name = self.function.partition(":")
        found: Callable[[Any], dict[str, Any]] = getattr(import_module(module), name)
        return found

    def foretold(self, folder: Path) -> dict[str, Any]:
        """What later steps may name, before the step has run."""
        return {key: str(folder / value) if str(value).startswith(".") else value for key, value in self.gives.items()}


TRAINED = {"model": "./model", "mlflow_run_id": "its run"}

VERBS = {
    "prepare": Verb("PrepareConfig", "finhpc.commands.prepare:prepare", {"out": "."}),
    "pretrain": Verb("PretrainConfig", "finhpc.commands.pretrain:pretrain", TRAINED),
    "decompose": Verb("DecomposeConfig", "finhpc.commands.decompose.command:decompose", {"model": "."}),
    "hold_out": Verb("HoldOutConfig", "finhpc.evaluation.hold_out:hold_out", {"files": {}, "tasks": []}),
    "finetune": Verb("FinetuneConfig", "finhpc.commands.finetune:finetune", TRAINED),
    "evaluate": Verb("EvaluateConfig", "finhpc.commands.evaluate.command:evaluate", {"mlflow_run_id": "its run"}),
    "measure": Verb("MeasureConfig", "finhpc.commands.reproduce.measure:measure", {}),
    "report": Verb("ReportConfig", "finhpc:report", {}),
}
