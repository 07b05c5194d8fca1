"""Likelihoods of answers are float32 whatever type the model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.models import huggingface

from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.models import load_for_evaluation
from tests.evaluation.tasks import write_model

Model = tuple[Any, Any]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_model(tmp_path_factory.mktemp("bf16") / "model")
    return load_for_evaluation(str(folder), dtype="bfloat16")


def scores(opened: Model, prompt: list[int], answers: list[list[int]]) -> list[float]:
    lm = LanguageModel(*opened, 4)
    requests: list[Any] = [(("", ""), prompt, answer) for answer in answers]
    return [score for score, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]


def test_labels_of_a_bf16_model_do_not_tie(bf16: Model) -> None:
    model, _ = bf16
    found = scores(bf16, [5, 9, 3], [[token] for token in range(300)])
    with torch.inference_mode():
        logits = model(torch.tensor([[5, 9, 3]])).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    exact = torch.log_softmax(logits.double(), -1)
    assert found == pytest.approx(exact.tolist(), abs=1e-5)
    assert len(set(found)) == len(set(logits.tolist())), "no two logits become one likelihood"
    assert len(torch.log_softmax(logits, -1).unique()) < len(set(found)), "as they do in bfloat16"


def test_a_long_answer_is_summed_without_rounding(bf16: Model) -> None:
    model, _ = bf16
    answer = torch.randint(300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    found = scores(bf16, [5], [answer, [*answer[:-1], answer[-1] - 1]])
    with torch.inference_mode():
        logits = model(torch.tensor([[5, *answer[:-1]]])).logits[0].double()
    exact = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum()
    assert found[0] == pytest.approx(float(exact), abs=1e-4)
    assert found[0] != found[1]


def test_lm_eval_does_not_guess_the_kind_of_a_model_that_it_does_not_know(
    bf16: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = bf16
    warnings: list[str] = []
    monkeypatch.setattr(model.config, "model_type", "lowrank_gpt2")
    monkeypatch.setattr(huggingface.eval_logger, "warning", warnings.append)
    assert LanguageModel(model, tokenizer, 4).backend == "causal"
    assert not [text for text in warnings if "HF model type" in text]


def test_perplexity_of_a_bf16_model_is_computed_in_float32(bf16: Model) -> None:
    from finhpc.evaluation.sample_losses import row_losses

    model, _ = bf16
    tokens = torch.arange(1, 33)[None]
    with torch.inference_mode():
        logits = model(tokens).logits[0, :-1].double()
    exact = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    assert row_losses(model, tokens) == pytest.approx([float(exact)], abs=1e-5)
