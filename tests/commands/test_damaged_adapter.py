"""An adapter whose weights are not numbers is refused by every command that would use it, before anything starts.

torch's attention on a CPU gives 0 for queries of NaN over a few keys: short texts of such an adapter would look sound.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from safetensors.torch import load_file, save_file

import finhpc
from finhpc.errors import FinhpcError
from finhpc.evaluation.models import subjects
from finhpc.settings.base import build
from finhpc.settings.generate import GenerateConfig
from finhpc.settings.serve import ServeConfig
from tests.serving.server import folders
from tests.waiting import free_port

Paths = tuple[str, str]  # of a base, and of an adapter that holds NaN


def generate(base: str, adapter: str) -> object:
    given = {"model": base, "adapters": [f"nan={adapter}"], "prompt": "the bank"}
    return finhpc.generate(build(GenerateConfig, given), dry_run=True)


def serve(base: str, adapter: str) -> object:
    given = {"model": base, "adapters": [f"nan={adapter}"], "port": free_port()}
    return finhpc.serve(build(ServeConfig, given), dry_run=True)


def evaluate(base: str, adapter: str) -> object:
    return subjects([base], [adapter])  # what its dry run checks


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    base, adapters = folders(tmp_path_factory.mktemp("models"))
    adapter = shutil.copytree(adapters["a0"], base.parent / "nan")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(base), str(adapter)


@pytest.mark.parametrize("command", [generate, serve, evaluate])
def test_it_is_refused_before_anything_starts(command: Callable[[str, str], object], paths: Paths) -> None:
    with pytest.raises(FinhpcError, match="holds NaN or infinity; train the adapter again"):
        command(*paths)
