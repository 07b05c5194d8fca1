"""Log probabilities of the ends of texts: those of the model's own forward pass, whatever the texts share."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from finhpc import load_model
from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.models import load_for_evaluation
from finhpc.generation import scoring
from finhpc.generation.decoder import Decoder
from finhpc.generation.scoring import BLOCK, last_log_probs
from finhpc.settings.pretrain import Qkv
from tests.generation.folders import tiny_adapter, tiny_folder, tiny_model
from tests.generation.test_batching import LAYERS, prompts_of
from tests.generation.test_decoding import MODELS
from tests.models.dense import saved
from tests.models.families import ROWS, tiny

BEGINNING, OTHER, *ENDS = prompts_of((50, 19, 3, 6, 9, 12, 1, 30))
TEXTS = [*(BEGINNING + end for end in ENDS), *(OTHER + end for end in ENDS[:3]), OTHER, ENDS[0], BEGINNING[:20]]
LAST = [1 + i % 4 for i in range(len(TEXTS))]  # never more than a text has
TEXTS.append([*BEGINNING, 299])  # of whose last ids others have computed some
LAST.append(20)


def plain(model: Any) -> list[Tensor]:
    with torch.inference_mode():
        logits = [model(torch.tensor([text]), use_cache=False).logits[0].float() for text in TEXTS]
    return [torch.log_softmax(rows[-last:], -1) for rows, last in zip(logits, LAST, strict=True)]


def found(decoder: Decoder, batch: int = 4) -> list[Tensor]:
    by_place = dict(last_log_probs(decoder, TEXTS, LAST, batch))
    return [by_place[i] for i in range(len(TEXTS))]


@pytest.mark.parametrize(("family", "kind", "qkv"), MODELS)
def test_they_are_the_models_own(family: str, kind: str, qkv: Qkv) -> None:
    model = tiny_model(family, kind, qkv=qkv)
    wanted, decoder = plain(model), Decoder(model)
    for batch in (1, 4, 100):
        torch.testing.assert_close(found(decoder, batch), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_so_are_those_of_described_families(row: str, tmp_path: Path) -> None:
    folder = saved(tiny(row), tmp_path / "model")
    wanted = plain(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval())
    torch.testing.assert_close(found(Decoder(load_model(folder))), wanted, atol=1e-4, rtol=1e-4)


def shared(first: list[int], second: list[int]) -> int:
    both = list(zip(first, second, strict=False))
    return next((i for i, (a, b) in enumerate(both) if a != b), len(both))


def test_what_texts_begin_with_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    wanted, decoder, whole = plain(model), Decoder(model), sum(map(len, TEXTS))
    found(decoder)
    most = sum(shared(*pair) for pair in itertools.pairwise(sorted(TEXTS)))
    assert whole - most <= decoder.computed_tokens <= whole - most + len(TEXTS) * (BLOCK + max(LAST))
    monkeypatch.setattr(scoring, "TOKENS", 24)  # texts are computed in parts, and blocks are few
    monkeypatch.setattr(scoring, "LOGITS", 3)
    torch.testing.assert_close(found(decoder), wanted, atol=1e-4, rtol=1e-5)
    assert list(last_log_probs(decoder, [], [], 4)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_scores_adapters_as_the_padded_pass_does(tmp_path: Path, dtype: str) -> None:
    source = tiny_folder(tmp_path / "model", "llama")
    adapter = tiny_adapter(tmp_path / "adapter", tiny_model("llama"), LAYERS, 4, seed=0)
    model, tokenizer = load_for_evaluation(str(source), str(adapter), dtype)
    lm = LanguageModel(model, tokenizer, 4)
    ends = [(text, last) for text, last in zip(TEXTS, LAST, strict=True) if len(text) > last]
    pairs: list[Any] = [(("", ""), text[:-last], text[-last:]) for text, last in ends]
    pairs += [(("", ""), TEXTS[0][:-1], [token]) for token in range(5)]  # of one row
    decoded = lm._loglikelihood_tokens(pairs)
    assert lm._decoder is not None
    lm._decoder = None
    padded = lm._loglikelihood_tokens(pairs)
    tolerance = 1e-4 if dtype == "float32" else 0.05
    assert [score for score, _ in decoded] == pytest.approx([score for score, _ in padded], rel=tolerance)
    if dtype == "float32":
        assert [choice for _, choice in decoded] == [choice for _, choice in padded]
