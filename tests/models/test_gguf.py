"""A .gguf file as a base: what finetuning learns beside it every command opens again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finhpc.commands.export import export
from finhpc.data.text import tokenizer as prepared
from finhpc.errors import ConfigError, FinhpcError
from finhpc.models.files.manifest import weights_fingerprint
from finhpc.models.files.source import copy_tokenizer, open_weights, tokenizer_of
from finhpc.models.lora.adapter_file import base_of
from finhpc.models.lora.peft_format import CONFIG, save_adapter
from finhpc.models.lora.targets import target_shapes
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import Lora
from tests.models.dense import tiny_llama
from tests.models.folders import (
    adapter_ways,
    assert_all_give,
    assert_all_refuse,
    exported,
    generator,
    logits,
    model_ways,
)
from tests.models.gguf_file import write_gguf
from tests.tiny import with_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(with_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder with a space in its name, beside another GGUF file."""
    place = tmp_path_factory.mktemp("a place")
    write_gguf(tiny_llama(layers=1), place / "other.gguf")
    return write_gguf(tiny_llama(layers=2), place / "the base.gguf", tokenizer, mlp_bits=8)


def wanted(base: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32).eval())


def trained_beside(base: Path, folder: Path) -> Path:
    """An adapter and a tokenizer as a run of finetune writes them."""
    weights, lora, draw = open_weights(base), Lora(rank=2), torch.Generator().manual_seed(0)
    trained = {}
    for name, (out, into) in target_shapes(weights.skeleton, lora, 16).items():
        trained |= {f"{name}.A": torch.randn(2, into, generator=draw) * 0.1}
        trained |= {f"{name}.B": torch.randn(out, 2, generator=draw) * 0.1}
    save_adapter(folder, lora, trained, weights, fingerprint=weights_fingerprint(base))
    copy_tokenizer(base, folder)
    return folder


def test_every_command_opens_it(base: Path, tmp_path: Path) -> None:
    assert_all_give(model_ways(base, tmp_path / "out"), wanted(base), tolerance=1e-4)
    ids = tokenizer_of(base)("the bank rate").input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the bank rate").input_ids == ids
    assert generator(base).encode("the bank rate") == ids
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 0


def test_every_command_opens_an_adapter_trained_beside_it(base: Path, tmp_path: Path) -> None:
    adapter = trained_beside(base, tmp_path / "adapter")
    ways = adapter_ways(base, adapter, tmp_path / "out")
    merged = ways.pop("export")()
    assert not torch.allclose(merged, wanted(base), atol=0.01)
    assert_all_give(ways, merged, tolerance=1e-4)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("the bank").input_ids
        == tokenizer_of(base)("the bank").input_ids
    )
    for bits in (8, 4):
        export(ExportConfig(model=str(adapter), out=str(tmp_path / f"q{bits}"), quantization={"bits": bits}))


def test_links_and_moved_files(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained_beside(base, tmp_path / "adapter")
    (tmp_path / "link.gguf").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    tree = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(tree | {"base_model_name_or_path": "link.gguf"}))
    assert base_of(adapter) == tmp_path / "link.gguf"
    exported(adapter, tmp_path / "out")
    (adapter / CONFIG).write_text(json.dumps(tree | {"base_model_name_or_path": "/moved/base.gguf"}))
    ways = adapter_ways(base, adapter, tmp_path / "out2")
    assert_all_refuse(
        {name: ways[name] for name in ("load_model", "evaluate the adapter", "export")}, "/moved/base.gguf"
    )
    other = write_gguf(tiny_llama(layers=2, tied=False), tmp_path / "other.gguf")
    ways = adapter_ways(other, adapter, tmp_path / "out2")
    assert_all_refuse({name: ways[name] for name in ("generate", "evaluate")}, "was trained with")


def test_a_folder_of_gguf_files_is_asked_which(base: Path, tmp_path: Path) -> None:
    assert_all_refuse(model_ways(base.parent, tmp_path / "out"), "other.gguf, the base.gguf", "give one of the files")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rope_freqs.weight": np.ones(4, np.float32)}, "holds rope_freqs.weight"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type=yarn"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.attention.key_length": 16}, "attention.key_length=16"),
        ({"llama.attention.sliding_window": 32}, "attention.sliding_window=32"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale=0.5"),
        ({"llama.attention.causal": False}, "attention.causal=False"),
        ({"split.count": 3}, "split.count=3"),
    ],
)
def test_settings_and_tensors_of_a_gguf_file_that_are_not_applied(
    more: dict[str, Any], said: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = write_gguf(tiny_llama(layers=2), tmp_path / "odd.gguf", tokenizer, more)
    assert_all_refuse(model_ways(path, tmp_path / "out"), said, str(path))


def test_linear_scaling_in_a_gguf_file_is_applied(tmp_path: Path) -> None:
    more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    weights = open_weights(write_gguf(tiny_llama(layers=2), tmp_path / "scaled.gguf", more=more))
    rope = weights.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 10000.0)


def test_a_gguf_file_without_tokenizer_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    path = write_gguf(tiny_llama(layers=1), tmp_path / "bare.gguf")
    ways = model_ways(path, tmp_path / "out")
    assert_all_refuse({name: ways[name] for name in ("generate", "evaluate")}, "without a token", str(path))
    ways["export"]()
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    shutil.copy(path, tmp_path / "bare.bin")
    with pytest.raises(ConfigError, match=r"is not a \.gguf file"):
        open_weights(tmp_path / "bare.bin")


def test_text_is_prepared_with_the_tokenizer_of_a_gguf_file(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared.save(str(base), out, lambda: iter(()))
    text = "Net income rose 12.5 %.\n\nGuidance was cut."
    assert prepared.Encoder(out).encode([text])[0].tolist()[:-1] == tokenizer_of(base)(text).input_ids
    write_gguf(tiny_llama(layers=1), tmp_path / "bare.gguf")
    (tmp_path / "cut.gguf").write_bytes(base.read_bytes()[:1000])
    for name, reason in (("bare", "without a token"), ("cut", "cut short"), ("missing", "is not a folder")):
        with pytest.raises(FinhpcError, match=reason):
            prepared.save(str(tmp_path / f"{name}.gguf"), out, lambda: iter(()))
