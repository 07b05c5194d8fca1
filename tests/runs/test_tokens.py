"""Tokenizers and models that do not fit are refused by every command; what a conversation teaches goes on with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from finhpc.commands.decompose.command import decompose
from finhpc.commands.export import export
from finhpc.commands.finetune import Finetune
from finhpc.errors import ConfigError
from finhpc.evaluation.models import subjects
from finhpc.generation.mlflow_model import TextGenerator
from finhpc.models.loading import load_model
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import build
from finhpc.settings.decompose import DecomposeConfig
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import FinetuneConfig
from finhpc.training.checkpoint import Checkpoint
from tests.data.instructing import jsonl
from tests.data.kinds import CHATML, tokenizer
from tests.generation.folders import folder_of_kind, tiny_adapter

TALK = [{"role": "user", "content": "What is it"}, {"role": "assistant", "content": "bread"}]


def settings(base: Path, source: str, storage: Path) -> FinetuneConfig:
    tree = {
        "model": {"path": str(base)},
        "data": {"source": [source], "max_len": 100, "eval_fraction": 0.0},
        "run": {"name": "run", "storage": str(storage)},
    }
    return build(FinetuneConfig, tree)


def refused_by(command: str, model: Path, tmp_path: Path) -> str:
    source = jsonl(tmp_path / "talk.jsonl", [{"context": "What", "target": "bread"}])
    tree = {"model": str(model), "out": str(tmp_path / "out")}
    ranked = tree | {"rank": 4}
    commands: dict[str, Callable[[], Any]] = {
        "finetune": lambda: Finetune(settings(model, source, tmp_path)),
        "evaluate": lambda: subjects([str(model)], []),
        "export": lambda: export(build(ExportConfig, tree), True),
        "decompose": lambda: decompose(build(DecomposeConfig, ranked), True),
    }
    with pytest.raises(ConfigError) as caught:
        commands[command]()
    return str(caught.value)


@pytest.mark.parametrize("command", ["finetune", "evaluate", "export", "decompose"])
def test_more_ids_than_rows_are_refused_before_anything_starts(command: str, tmp_path: Path) -> None:
    tok = tokenizer("metaspace first")
    model = folder_of_kind(tmp_path / "model", tok, rows=len(tok) - 3)
    message = refused_by(command, model, tmp_path)
    assert f"an embedding of {len(tok) - 3} rows" in message
    assert f"({len(tok)} ids)" in message
    assert not (tmp_path / "out").exists()


def test_a_padded_embedding_and_a_token_that_pads_are_fine(tmp_path: Path) -> None:
    tok = tokenizer("metaspace first", "chatml")
    size = len(tok)
    tok.add_special_tokens({"pad_token": "[PAD]"})
    source = jsonl(tmp_path / "talk.jsonl", [{"messages": TALK}])
    for rows in (size, size + 60):
        model = folder_of_kind(tmp_path / f"model-{rows}", tok, rows=rows)
        assert Finetune(settings(model, source, tmp_path)).examples.counts["examples"] == 1
        assert subjects([str(model)], [])
        export(build(ExportConfig, {"model": str(model), "out": str(tmp_path / f"out-{rows}")}))


def test_the_end_that_a_conversation_teaches_goes_with_the_adapter_and_its_export(tmp_path: Path) -> None:
    tok = tokenizer("metaspace first", "chatml")
    base = folder_of_kind(tmp_path / "base", tok)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": tok.eos_token_id, "top_k": 5}))
    end = tok.convert_tokens_to_ids("<|im_end|>")
    for name, record, ends in (
        ("talk", {"messages": TALK}, [tok.eos_token_id, end]),
        ("plain", {"context": "What", "target": "bread"}, tok.eos_token_id),
    ):
        job = Finetune(settings(base, jsonl(tmp_path / f"{name}.jsonl", [record]), tmp_path))
        job.save_model(tmp_path / name, Checkpoint(tmp_path, {"files": {}}))
        assert json.loads((tmp_path / name / "generation_config.json").read_text()) == {
            "eos_token_id": ends,
            "top_k": 5,
        }
    adapter = tiny_adapter(tmp_path / "adapter", load_model(base), ["model.layers.0.self_attn.q_proj"], 2, seed=0)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for form in ("merged", "native"):
        export(build(ExportConfig, {"model": str(adapter), "out": str(tmp_path / form), "format": form}))
        assert load_model(tmp_path / form).generation_config.eos_token_id == [tok.eos_token_id, end]  # type: ignore[union-attr]


class Clock:
    """What a template asks for the day."""

    day = 1

    @classmethod
    def now(cls) -> datetime:
        return datetime(2026, 1, cls.day)


def test_a_template_with_the_date_does_not_stop_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    tok = tokenizer("byte level", "chatml")
    tok.chat_template = "{{ strftime_now('%d') }}" + CHATML
    base = folder_of_kind(tmp_path / "base", tok)
    source = jsonl(tmp_path / "talk.jsonl", [{"messages": TALK}])
    first = Finetune(settings(base, source, tmp_path))
    folder = RunFolder(tmp_path, "run")
    with folder.lock():
        folder.write_config(first.config, *first.fingerprints)
        first.prepare(folder.path)
    monkeypatch.setattr(Clock, "day", 2)
    again = Finetune(settings(base, source, tmp_path))
    folder.check_resume(again.config, *again.fingerprints)
    moved = jsonl(tmp_path / "moved.jsonl", [{"messages": TALK}])
    again = Finetune(settings(base, moved, tmp_path))
    folder.check_resume(again.config, *again.fingerprints)
    other = Finetune(settings(base, jsonl(tmp_path / "talk.jsonl", [{"messages": [*TALK, *TALK]}]), tmp_path))
    with pytest.raises(ConfigError, match="has other data"):
        folder.check_resume(other.config, *other.fingerprints)


def test_a_model_out_of_mlflow_reads_prompts_as_generate_does(tmp_path: Path) -> None:
    tok = tokenizer("metaspace first", begin=True, end=True)
    model: Any = load_model(folder_of_kind(tmp_path / "model", tok))
    (text,) = TextGenerator(model, AutoTokenizer.from_pretrained(tmp_path / "model")).predict(
        ["Alder Foods"], {"max_new_tokens": 32}
    )
    ids = torch.tensor([[tok.bos_token_id, *tok("Alder Foods", add_special_tokens=False).input_ids]])
    with torch.inference_mode():
        whole = model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=tok.eos_token_id)
    assert text == tok.decode(whole[0], skip_special_tokens=True)
