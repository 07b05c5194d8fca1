"""A model exported with `--format executorch`, run by ExecuTorch and compared with the model itself.

ExecuTorch has an environment of its own; EXECUTORCH_PYTHON names its interpreter, if it is not this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import finhpc
from finhpc.errors import ConfigError
from finhpc.models.export import executorch_file
from finhpc.models.families.registry import config_of_method, resolve_shape
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.settings.pretrain import Method, Model
from tests.models.dense import saved, tiny_llama
from tests.models.runtimes import IDS, apart, exported, greedy_of, logits_of
from tests.tiny import tiny_shards

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-tiny", {"rank": 32}),
    "llama-cola": ("llama-tiny", {"kind": "cola", "rank": 32}),
    "gpt2": ("gpt2-tiny", {"kind": "dense"}),
}
RUNS = Path(__file__).with_name("executorch_runs.py")
CASES = [("llama", 16), ("llama", 8), ("llama", 4), ("llama-cola", 16), ("gpt2", 8)]
UNQUANTIZED = {"llama": ["model.embed_tokens"], "gpt2": ["transformer.wte", "transformer.wpe"]}
TOLD = {
    "get_max_seq_len": [63], "get_max_context_len": [64], "get_vocab_size": [300], "use_kv_cache": [True],
    "enable_dynamic_shape": [True], "get_bos_id": [0], "get_eos_ids": [0],
}  # fmt: skip
BOUNDS = {16: 1e-5, 8: 0.06, 4: 0.6}  # of weights as large as these; activations are rounded to 8 bits, too


def made(name: str, folder: Path) -> Path:
    preset, method = MODELS[name]
    sizes = {"preset": preset, "layers": 1, "width": 64, "vocab_size": 300, "context": 64}
    config = config_of_method(resolve_shape(Model.model_validate(sizes), 300), Method(**method))
    model = initial_model(config, seed=1, scheme="spectral")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    shards = tiny_shards(folder.with_name(f"{folder.name}-shards"), blocks=8)
    weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    save_model(folder, config, weights.items(), shards / "tokenizer")
    return folder


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_executorch_computes_what_the_model_computes(name: str, bits: int, tmp_path: Path) -> None:
    python = os.environ.get("EXECUTORCH_PYTHON") or (sys.executable if find_spec("executorch") else None)
    if python is None:
        pytest.skip("ExecuTorch is not installed here; set EXECUTORCH_PYTHON to an interpreter that has it and finhpc")
    folder, out, asked = made(name, tmp_path / "model"), tmp_path / "out", tmp_path / "request.json"
    asked.write_text(json.dumps({"model": str(folder), "bits": bits, "out": str(out), "ids": IDS, "new": 8}))
    done = subprocess.run([python, str(RUNS), str(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    model = finhpc.load_model(folder)
    wanted = logits_of(model)[len(IDS) // 2 - 1 :]
    assert apart(torch.tensor(answer["logits"]), wanted) < BOUNDS[bits]
    assert bits < 16 or answer["greedy"] == greedy_of(folder, 8)
    assert answer["told"] == TOLD
    size = (out / "model.pte").stat().st_size
    assert answer["result"]["size_bytes"] == size
    if bits < 16:
        assert answer["result"]["not_quantised"] == UNQUANTIZED[name]
        assert size < 4 * model.num_parameters()


def test_what_the_format_cannot_express_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("llama", tmp_path / "llama")
    monkeypatch.setattr(executorch_file, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package executorch, .* pip install finhpc executorch in an env"):
        exported(folder, tmp_path / "out", "executorch")
    monkeypatch.setattr(executorch_file, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="adapters is for format=gguf and onnx; leave it out"):
        exported(folder, tmp_path / "out", "executorch", adapters=["x=y"])
    monkeypatch.setattr(executorch_file, "FAMILIES", ("gpt2",))
    with pytest.raises(ConfigError, match="model_type=llama; it writes gpt2"):
        exported(saved(tiny_llama(layers=1), tmp_path / "dense"), tmp_path / "out", "executorch")
    assert not (tmp_path / "out").exists()
