"""A frozen base with adapters: what loading it takes."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from finhpc.models.files.source import open_weights
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
from finhpc.settings.finetune import FinetuneQuantization, Lora
from finhpc.training.memory import live_tensor_bytes
from tests.models.dense import saved

LAYERS, WIDTH, HIDDEN = 12, 256, 512


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=300, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return saved(LlamaForCausalLM(config).to(torch.bfloat16), tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(("bits", "scheme"), [(16, "auto"), (8, "int8"), (4, "nf4"), (8, "minmax"), (4, "minmax")])
@pytest.mark.parametrize("stage", [0, 1])
def test_loading_peaks_at_the_quantised_stage_and_one_layer(base: Path, bits: int, scheme: str, stage: int) -> None:
    quantization = FinetuneQuantization.model_validate({"bits": bits, "scheme": scheme})
    lora_model = LoraModel(open_weights(base), Lora(rank=2), quantization, bf16=True)
    borders = lora_model.borders(2)
    parts = lora_model.parts()[borders[stage] : borders[stage + 1]]
    before = live_tensor_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layers = [LoraPipelineLayer(part, lora_model, torch.device("cpu")) for part in parts]
    held = live_tensor_bytes() - before
    weights = LAYERS // 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN) * bits // 8
    assert weights < held < 1.1 * weights + 2 * 2 * 300 * WIDTH + 2**19
    largest = 4 * WIDTH * HIDDEN  # in float32, as read: the one layer
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    mapped = (base / "model.safetensors").stat().st_size  # the file is mapped, not loaded, while a tensor is read
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if abs(e.nbytes()) != mapped]
    assert len(sizes) < len(events)
    assert max(accumulate(sizes)) - held <= 4 * largest
    assert len(layers) == len(parts)
