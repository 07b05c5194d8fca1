"""Whatever of transformers is imported first, it works, and knows finhpc's models and quantiser afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

KNOWN = """
import sys, finhpc
assert "transformers" not in sys.modules, "import finhpc stays light"
from transformers import {first}
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
import torch
config = AutoConfig.for_model("lowrank_gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=8)
with torch.device("meta"):
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == "LowRankGPT2LMHeadModel"
assert any("finhpc" in kind.__module__ for kind in AUTO_QUANTIZATION_CONFIG_MAPPING.values())
assert not any(type(finder).__module__ == "finhpc.registration" for finder in sys.meta_path)
"""


# A model's own class imports the list of all models while it is half imported itself.
@pytest.mark.parametrize("first", ["AutoModelForCausalLM", "GPT2LMHeadModel", "BertModel"])
def test_transformers_knows_finhpc_whatever_is_imported_first(first: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KNOWN.format(first=first)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
