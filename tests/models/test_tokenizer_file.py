"""One reading of a folder's tokenizer, whatever the model beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from finhpc.commands.export import export
from finhpc.data.text.tokenizer import Encoder, save
from finhpc.errors import ConfigError
from finhpc.evaluation.models import load_for_evaluation
from finhpc.generation.generator import Generator
from finhpc.models.families.registry import as_low_rank
from finhpc.models.files.tokenizer import open_tokenizer
from finhpc.models.initialize import initial_model
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.generate import GenerateConfig
from tests.data.kinds import tokenizer
from tests.models.dense import saved, tiny_llama, tiny_qwen2
from tests.models.gguf_file import write_gguf
from tests.parity.tokenizer_kinds import Kind, tokenizer_of

TEXT = "What does Alder Foods sell in 2023?  it is"


@pytest.mark.parametrize("kind", ["unigram", "metaspace first"])
def test_a_qwen2_has_the_tokenizer_that_it_was_trained_with(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_qwen2()
    base = saved(model, tmp_path / "base")
    low_rank = tmp_path / "low-rank"
    ranks = {"attention": 4, "mlp": 4, "head": None, "embedding": None}
    initial_model(as_low_rank(model.config, ranks), 0, None).save_pretrained(low_rank)
    made = tokenizer(kind)
    for folder in (base, low_rank):
        made.save_pretrained(folder)
    ids = Tokenizer.from_file(str(base / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(base)(TEXT).input_ids != ids, "transformers takes Qwen2's own class"
    save(str(base), tmp_path / "prepared", lambda: iter(()))
    for folder in (base, tmp_path / "prepared"):
        assert Encoder(folder).encode([TEXT])[0].tolist() == [*ids, made.eos_token_id], "prepare"
    export(build(ExportConfig, {"model": str(low_rank), "out": str(tmp_path / "merged"), "format": "merged"}))
    for folder in (base, low_rank, tmp_path / "merged"):
        assert load_for_evaluation(str(folder))[1](TEXT).input_ids == ids, folder
        settings = {"model": str(folder), "prompt": TEXT, "sampling": {"max_new_tokens": 2}}
        assert Generator(build(GenerateConfig, settings)).encode(TEXT) == ids, folder
    lines = [line for line in capfd.readouterr().err.splitlines() if "AutoTokenizer uses Qwen2Tokenizer" in line]
    assert len(lines) == len(set(lines)) == 2, "once for each folder that transformers reads otherwise"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", '{"model": {"type": "Foo"}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": ["zz qq"]}}'),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_tokenizer_is_one_error(file: str, text: str, tmp_path: Path) -> None:
    tokenizer("unigram").save_pretrained(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match="comes without a tokenizer that opens"):
        open_tokenizer(tmp_path)


def test_a_gguf_file_has_its_own_tokens_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_llama(448), path, tokenizer_of(Kind("byte level")))
    opened = load_for_evaluation(str(path))[1]
    assert max(opened.get_vocab().values()) < 448
    plain = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert max(plain.get_vocab().values()) == 448, "transformers adds an end of text"
    assert opened(TEXT).input_ids == plain(TEXT).input_ids
    assert opened.all_special_tokens == plain.all_special_tokens
    assert opened.chat_template == plain.chat_template
