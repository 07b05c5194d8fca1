"""A model exported for ExecuTorch and run in it: `python executorch_runs.py REQUEST.json`, by a python that has it.

Request: `model` (folder), `bits`, `out`, `ids`, `new`. Prints a line of JSON: the result of the export, the logits
after the first half of the ids and after each of the others, and greedy ids after them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from executorch.runtime import Runtime

from finhpc.commands.export import export
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    how = {"format": "executorch", "quantization": {"bits": request["bits"]}}
    result = export(build(ExportConfig, {key: request[key] for key in ("model", "out")} | how))
    answer = run(Path(request["out"], "model.pte"), request["ids"], request["new"])
    print(json.dumps({"result": result} | answer), flush=True)


def run(path: Path, ids: list[int], new: int) -> dict[str, Any]:
    program = Runtime.get().load_program(path)
    told = {name: list(program.load_method(name).execute([])) for name in program.method_names if name != "forward"}
    forward = program.load_method("forward")

    def after(tokens: list[int], at: int) -> torch.Tensor:
        logits: torch.Tensor = forward.execute([torch.tensor([tokens]), torch.arange(at, at + len(tokens))])[0]
        return logits[0, -1].clone()

    half = len(ids) // 2
    rows = [after(ids[:half], 0)] + [after(ids[i : i + 1], i) for i in range(half, len(ids))]
    greedy = [int(rows[-1].argmax())]
    while len(greedy) < new:
        greedy.append(int(after(greedy[-1:], len(ids) + len(greedy) - 1).argmax()))
    return {"told": told, "logits": [row.tolist() for row in rows], "greedy": greedy}


if __name__ == "__main__":
    main()
