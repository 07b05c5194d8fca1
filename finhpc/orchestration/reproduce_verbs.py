"""The verbs that a reproduction is made of: their settings, their functions, and what their results will hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from finhpc import config
from finhpc.config import Section


@dataclass(frozen=True)
class Verb:
    """`name`: of its settings in finhpc.config. `function`: module:function.

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
    "prepare": Verb("PrepareConfig", "finhpc.data.prepare:prepare", {"out": "."}),
    "pretrain": Verb("PretrainConfig", "finhpc.orchestration.pretrain:pretrain", TRAINED),
    "decompose": Verb("DecomposeConfig", "finhpc.orchestration.decompose:decompose", {"model": "."}),
    "hold_out": Verb("HoldOutConfig", "finhpc.evaluation.hold_out:hold_out", {"files": {}, "tasks": []}),
    "finetune": Verb("FinetuneConfig", "finhpc.orchestration.finetune:finetune", TRAINED),
    "evaluate": Verb("EvaluateConfig", "finhpc.orchestration.evaluate:evaluate", {"mlflow_run_id": "its run"}),
    "measure": Verb("MeasureConfig", "finhpc.orchestration.measure:measure", {}),
    "report": Verb("ReportConfig", "finhpc:report", {}),
}
