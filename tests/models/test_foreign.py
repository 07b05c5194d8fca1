"""A model or tokenizer folder that brings Python code: nobody is asked whether it may run, and it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finhpc.data.text.tokenizer import _copy
from finhpc.errors import FinhpcError
from finhpc.evaluation.models import load_for_evaluation
from finhpc.generation.generator import Generator
from finhpc.models.files.weights import read_config
from finhpc.settings.base import build
from finhpc.settings.generate import GenerateConfig
from tests.generation.folders import tiny_folder

OPENED: dict[str, Callable[[Path], Any]] = {
    "config": read_config,
    "evaluation": lambda folder: load_for_evaluation(str(folder)),
    "tokenizer": lambda folder: _copy(str(folder), folder / "copy"),
    "generation": lambda folder: Generator(build(GenerateConfig, {"model": str(folder), "prompt": "a"})),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("foreign") / "model", "llama")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A whole model with a Python file that holds classes for its config and its tokenizer."""
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


def bring(folder: Path, file: str, **own: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | own))


@pytest.mark.parametrize("name", OPENED)
def test_code_in_a_folder_never_runs(folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    if name == "tokenizer":
        own = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
        bring(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    else:
        bring(folder, "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(FinhpcError, match=r"Python code of its own \(auto_map\)"):
        OPENED[name](folder)
    assert not asked
    assert not (tmp_path / "ran").exists()
