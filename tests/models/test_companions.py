"""What goes along with weights: tokenizers, chat templates and generation configs reach every folder that is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from finhpc.commands.export import export
from finhpc.models.files.source import copy_tokenizer, open_weights
from finhpc.models.folder import save_model
from finhpc.models.loading import load_model
from finhpc.settings.export import ExportConfig
from tests.models.dense import saved, tiny_llama
from tests.models.folders import generator, peft_adapter
from tests.tiny import with_tokenizer

TEMPLATE = "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template in a file of its own, templates for tools beside it, and two ends of text."""
    folder = with_tokenizer(saved(tiny_llama(layers=2, tied=False), tmp_path_factory.mktemp("llama") / "base"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "added_tokens.json").write_text("{}")
    GenerationConfig(eos_token_id=[0, 7], temperature=0.3, do_sample=True).save_pretrained(folder)
    (folder / "README.md").write_text("of the base alone")
    return folder


def companions(folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "ids": tokenizer("the bank rate").input_ids,
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "rate"}], tokenize=False),
        "templates": sorted(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else None,
        "eos": json.loads((folder / "generation_config.json").read_text())["eos_token_id"],
        "added": (folder / "added_tokens.json").is_file(),
    }


@pytest.mark.parametrize(("form", "bits"), [("merged", 16), ("merged", 8), ("native", 16), ("native", 4)])
def test_an_export_of_a_bare_adapter_has_its_bases(base: Path, form: Any, bits: Any, tmp_path: Path) -> None:
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert not list(adapter.glob("tokenizer*"))
    export(ExportConfig(model=str(adapter), out=str(tmp_path / "out"), format=form, quantization={"bits": bits}))
    assert companions(tmp_path / "out") == companions(base)
    assert generator(tmp_path / "out").stop == generator(base).stop == {0, 7}
    assert not (tmp_path / "out" / "README.md").exists()


def test_an_adapters_own_tokenizer_and_ends_go_before_its_bases(base: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE + "!"
    tokenizer.save_pretrained(adapter)
    GenerationConfig(eos_token_id=5).save_pretrained(adapter)
    export(ExportConfig(model=str(adapter), out=str(tmp_path / "out"), format="merged"))
    made = companions(adapter) | {"added": False, "eos": [5, 0]}  # the tokenizer's own end goes along
    assert companions(tmp_path / "out") == made
    assert (made["chat"], made["templates"]) == ("<user> rate!", None)


def test_models_of_runs_and_of_decompositions_have_them(base: Path, tmp_path: Path) -> None:
    weights = open_weights(base)
    (tmp_path / "decomposed").mkdir()
    assert copy_tokenizer(base, tmp_path / "decomposed")
    assert companions(tmp_path / "decomposed") == companions(base)
    model = load_model(base)
    save_model(tmp_path / "run", weights.config, model.state_dict().items(), base)
    assert companions(tmp_path / "run") == companions(base)
    assert load_model(tmp_path / "run").generation_config.eos_token_id == [0, 7]
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "none").mkdir()
    assert not copy_tokenizer(bare, tmp_path / "none")
