"""Models that are exported for other runtimes, and these runtimes on them; tests skip where one is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finhpc
from finhpc.bench.in_runtime import TOKENS, LlamaCpp, onnx_logits
from finhpc.commands.export import export
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig

REMEDIES = {
    "xllamacpp": "llama.cpp is not installed here; run pip install xllamacpp",
    "onnxruntime_genai": 'onnxruntime-genai is not installed here; run pip install "finhpc[onnx]"',
}
IDS = [(7 * i + 3) % 300 for i in range(24)]


def needs(package: str) -> None:
    pytest.importorskip(package, reason=REMEDIES[package], exc_type=ImportError)


def exported(source: Path, out: Path, form: str, bits: int = 16, **more: Any) -> dict[str, Any]:
    tree = {"model": str(source), "out": str(out), "format": form, "quantization": {"bits": bits}}
    return export(build(ExportConfig, tree | more))


def request(path: Path, new: int = 0) -> dict[str, Any]:
    return {"path": str(path), "prompt": IDS, "new": new, "threads": 1, "windows": [IDS]}


def logits_in_onnx(path: Path) -> Tensor:
    """Logits (tokens, vocabulary) of `IDS` in ONNX Runtime."""
    return torch.tensor(onnx_logits(request(path))(IDS)).float()


def llama_cpp(path: Path, *adapters: Path) -> LlamaCpp:
    return LlamaCpp(request(path), 64, [str(adapter) for adapter in adapters])


def log_probabilities_in(model: LlamaCpp, vocab: int) -> Tensor:
    """Log probabilities (tokens, vocabulary) after each of `IDS` in llama.cpp, which gives one position per request."""
    rows = torch.full((len(IDS), vocab), torch.nan)
    for i, row in enumerate(rows):
        for token, value in model.log_probabilities(IDS[: i + 1]).items():
            row[token] = value
    return rows


def greedy_in(form: str, path: Path, new: int) -> list[int]:
    return list(TOKENS[form](request(path, new)))[1:]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([IDS])).logits[0].float()
    return found


def greedy_of(folder: Path, new: int) -> list[int]:
    model = finhpc.load_model(folder).float()
    ids = model.generate(torch.tensor([IDS]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [int(token) for token in ids[0, len(IDS) :]]


def apart(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())
