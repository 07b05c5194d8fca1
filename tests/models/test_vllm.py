"""Exported models in vLLM give the text of `finhpc generate`: merged, as adapters, and low-rank by the plug-in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from finhpc.generation.generator import Generator
from finhpc.models.families.presets import Shape
from finhpc.models.families.registry import config_of_method
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.settings.base import load
from finhpc.settings.generate import GenerateConfig
from finhpc.settings.pretrain import Method
from tests.models import in_vllm
from tests.models.folders import peft_adapter
from tests.models.runtimes import exported
from tests.tiny import tiny_shards

ROOT = Path(__file__).parents[2]
PROMPTS = ["the bank rate rises", "markets wait for news of growth and prices fall"]
NEW = 16
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"kind": "dense"}),
    "gpt2-low": ("gpt2", {"rank": 24}),
    "gpt2-separate": ("gpt2", {"rank": 16, "qkv": "separate", "head": "dense"}),
    "gpt2-cola": ("gpt2", {"kind": "cola", "rank": 24, "qkv": "separate"}),
    "llama": ("llama", {"kind": "dense"}),
    "llama-low": ("llama", {"rank": 24, "embedding": "low_rank"}),
    "llama-half": ("llama", {"kind": "half", "rank": 24}),
    "llama-sparse": ("llama", {"kind": "sltrain", "rank": 8}),
    "mistral-low": ("mistral", {"rank": 24, "head": "dense"}),
    "qwen2-low": ("qwen2", {"rank": 24}),
}
MERGED = ["gpt2", "gpt2-low", "gpt2-separate", "llama", "llama-low", "llama-sparse", "mistral-low", "qwen2-low"]
FACTORS = ["gpt2-low", "gpt2-separate", "gpt2-cola", "llama-low", "llama-half", "mistral-low", "qwen2-low"]


def interpreter() -> Path:
    """The Python of an environment with vLLM, which needs other packages than finhpc does."""
    named = os.environ.get("FINHPC_VLLM")
    found = Path(named) if named else ROOT / ".venv-vllm" / "bin" / "python"
    if not found.is_file():
        pytest.skip(f"no vLLM: {found} does not exist; run make vllm, or set FINHPC_VLLM to a Python that has it")
    return found


def made(folder: Path, name: str, shards: Path) -> Path:
    """A model folder with weights as large as trained ones are."""
    family, method = MODELS[name]
    of_family = {} if family == "gpt2" else {"kv_heads": 1, "mlp_width": 96}
    # vLLM's attention for CPUs needs heads of at least 32.
    shape = Shape(family, 2, 64, 2, 128, 300, tie_embeddings=family == "gpt2", **of_family)  # type: ignore[arg-type]
    config = config_of_method(shape, Method(**method))
    model = initial_model(config, seed=1, scheme=None)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too are no longer 0 and 1
            parameter.add_(0.15 * torch.randn_like(parameter))
    weights = {key: value.detach().contiguous() for key, value in model.named_parameters()}
    save_model(folder / name, config, weights.items(), shards / "tokenizer")
    return folder / name


def texts(model: Path, adapter: Path | None = None) -> list[str]:
    """What `finhpc generate` answers to the prompts."""
    sampling = {"max_new_tokens": NEW, "temperature": 0}
    tree: dict[str, Any] = {"model": str(model), "dtype": "float32", "sampling": sampling}
    tree["adapters"], name = ([f"a={adapter}"], "a") if adapter else ([], None)
    generator = Generator(load(GenerateConfig, None, tree))
    return [generator.stream_text(generator.encode(prompt, name), name, lambda _: None) for prompt in PROMPTS]


def in_one_process(cases: dict[str, dict[str, Any]], place: Path) -> dict[str, dict[str, Any]]:
    """The answers of vLLM to all cases, with finhpc's plug-in installed."""
    point = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    installed = place / "finhpc-0.1.0.dist-info"  # what pip would write
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: finhpc\nVersion: 0.1.0\n")
    lines = [f"{name} = {target}\n" for name, target in point.items()]
    (installed / "entry_points.txt").write_text("".join(["[vllm.general_plugins]\n", *lines]))
    (place / "request.json").write_text(json.dumps(list(cases.values())))
    command = [str(interpreter()), in_vllm.__file__, str(place / "request.json"), str(place / "answer.json")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{place}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, json.loads((place / "answer.json").read_text()), strict=True))


@pytest.mark.slow
def test_vllm_gives_the_text_of_generate(tmp_path: Path) -> None:
    interpreter()
    shards = tiny_shards(tmp_path / "shards", blocks=8)
    tokenizer = AutoTokenizer.from_pretrained(shards / "tokenizer")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    folders = {name: made(tmp_path, name, shards) for name in MODELS}
    cases: dict[str, dict[str, Any]] = {}
    wanted: dict[str, list[str]] = {}

    def case(name: str, model: Path, expected: list[str], adapter: Path | None = None) -> None:
        cases[name] = {"model": str(model), "adapter": adapter and str(adapter), "prompts": prompts, "new": NEW}
        wanted[name] = expected

    of = {name: texts(folder) for name, folder in folders.items()}
    for name in MERGED:
        exported(folders[name], tmp_path / f"{name}-merged", "merged", dtype="float32")
        case(f"{name}, merged", tmp_path / f"{name}-merged", of[name])
    for name in FACTORS:
        exported(folders[name], tmp_path / f"{name}-native", "native", dtype="float32")
        case(f"{name}, factors", tmp_path / f"{name}-native", of[name])
    targets = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"]}
    for name, modules in targets.items():
        adapter = peft_adapter(folders[name], tmp_path / f"{name}-adapter", target_modules=modules)
        exported(adapter, tmp_path / f"{name}-adapted", "merged", dtype="float32")
        case(f"{name}, its adapter merged", tmp_path / f"{name}-adapted", texts(folders[name], adapter))
    small = tmp_path / "llama-small-adapter"
    exported(tmp_path / "llama-adapter", small, "adapter", rank=2)
    case("llama, its adapter", folders["llama"], texts(folders["llama"], small), small)
    exported(folders["llama-low"], tmp_path / "packed", "native", bits=8)
    refused = {"packed": tmp_path / "packed", "sparse factors": folders["llama-sparse"]}
    for name, folder in refused.items():
        cases[name] = cases["llama, merged"] | {"model": str(folder)}

    answers = in_one_process(cases, tmp_path)
    errors = {name: answers.pop(name).get("error", "") for name in refused}
    assert "Unknown quantization method: " in errors["packed"]
    assert re.search(r"method\.kind=sltrain .*; run finhpc export --format merged", errors["sparse factors"])
    found = {
        name: answer.get("error") or [tokenizer.decode(ids, skip_special_tokens=True) for ids in answer["ids"]]
        for name, answer in answers.items()
    }
    assert found == wanted
    assert len({text for each in wanted.values() for text in each}) > 10, "the models must differ"
