"""Exported models on a GPU: the CPU's logits and perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.commands.export import export
from finhpc.data.shards.shards import Shards
from finhpc.evaluation.models import load_for_evaluation
from finhpc.evaluation.perplexity import perplexity
from finhpc.models.loading import load_model
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig, EvaluateData
from finhpc.settings.export import ExportConfig
from tests.generation.folders import tiny_folder
from tests.gpu import CUDA, DEVICE, ON, needs_gpu

pytestmark = needs_gpu

WIDTHS = [(16, "minmax"), (8, "minmax"), (4, "minmax"), (8, "int8"), (4, "nf4")]
TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(0))


def exported(folder: Path, family: str, kind: str, bits: int, scheme: str) -> Path:
    """A model with a tokeniser; beside it in `model-shards` text of the same one."""
    source, out = tiny_folder(folder / "model", family, kind), folder / "exported"
    tree = {"model": str(source), "out": str(out), "quantization": {"bits": bits, "scheme": scheme}}
    export(build(ExportConfig, tree))
    return out


@pytest.mark.parametrize(("bits", "scheme"), WIDTHS)
@pytest.mark.parametrize(("family", "kind"), [("gpt2", "dense"), ("llama", "low_rank")])
def test_logits_and_perplexity_are_the_cpus(tmp_path: Path, family: str, kind: str, bits: int, scheme: str) -> None:
    folder = exported(tmp_path, family, kind, bits, scheme)
    shards = Shards.open(str(tmp_path / "model-shards"))
    plain: Any = load_model(folder)
    assert plain.device.type == "cpu", "wherever it is quantised"
    model, _ = load_for_evaluation(str(folder), dtype="float32", device=ON)
    assert next(model.parameters()).device.type == ON
    loose = CUDA and scheme in ("int8", "nf4")  # bitsandbytes' kernels: float16 sums; bfloat16 on CPUs
    with torch.inference_mode():
        wanted, found = plain(TOKENS).logits, model(TOKENS.to(DEVICE)).logits.cpu()
    assert (found - wanted).norm() <= (5e-2 if loose else 1e-4) * wanted.norm()
    settings = EvaluateConfig(data=EvaluateData(seq_len=64), limit=8, batch_size=4, bootstrap=0)
    (mine, _), (own, _) = (perplexity(m, shards, settings) for m in (model, plain))
    assert mine["loss"] == pytest.approx(own["loss"], rel=2e-2 if loose else 1e-5)
