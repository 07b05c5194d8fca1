"""The choice among labels: its loss and gradients against plain loops, its packs, and what an evaluation counts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finhpc.data.examples.batches import Batches
from finhpc.data.examples.choices.candidates import Answer, Candidates
from finhpc.data.examples.examples import Arrays, Examples
from finhpc.models import label_loss as module
from finhpc.models.label_loss import label_loss
from finhpc.models.packing.layout import FIELDS
from finhpc.models.packing.layout import Candidates as Rows
from finhpc.settings.training import Parallel
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.models.families import tiny
from tests.models.packs import peft_model, peft_parameters
from tests.training.processes import run_processes
from tests.training.test_adapting import PACKS, settings, train

SINGLE: list[Answer] = [(11,), (12,), (13,)]
SEVERAL: list[Answer] = [(11,), (11, 7), (12, 8, 9)]  # the first is the beginning of the second
SMOOTHING = 0.2


def weights_of(labels: list[Answer]) -> dict[Answer, float]:
    return dict(zip(labels, (0.5, 1.0, 3.0), strict=True))


def arrays(count: int, answers: list[list[Answer]]) -> Arrays:
    """Examples with a common beginning; example i is of source i % 2."""
    draw = np.random.default_rng(0)
    rows: list[tuple[list[int], Answer]] = []
    for i in range(count):
        prompt = [*range(20, 30), *draw.integers(30, 300, 3 + i % 5).tolist()]
        rows.append((prompt, answers[i % 2][i % 3]))
    return Arrays(
        np.array([token for prompt, answer in rows for token in [*prompt, *answer]], np.int32),
        np.cumsum([0, *(len(prompt) + len(answer) for prompt, answer in rows)]),
        np.array([i >= len(prompt) for prompt, answer in rows for i in range(len(prompt) + len(answer))]),
        np.arange(count, dtype=np.int32) % 2,
    )


def scores_of(model: Any, prompt: list[int], labels: list[Answer]) -> Tensor:
    """Log-likelihoods of labels after a prompt, one sequence at a time."""
    scores = []
    for label in labels:
        log_probs = model(torch.tensor([[*prompt, *label]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        scores.append(log_probs[range(len(label)), list(label)].sum())
    return torch.stack(scores)


def plain(model: Any, data: Arrays, answers: list[list[Answer]], learned: bool) -> tuple[Tensor, list[tuple[int, int]]]:
    """Mean loss of the choices by its definition, and (own, chosen) places."""
    total, chosen = torch.zeros(()), []
    for i in range(len(data)):
        tokens, mask = data.example(i)
        labels = answers[int(data.source[i])]
        scores = scores_of(model, tokens[~mask].tolist(), labels)
        log_probs = scores.log_softmax(-1)
        own = labels.index(tuple(tokens[mask].tolist()))
        smoothing, weight = (SMOOTHING, weights_of(labels)[labels[own]]) if learned else (0.0, 1.0)
        total = total - weight * ((1 - smoothing) * log_probs[own] + smoothing * log_probs.mean())
        chosen.append((own, int(scores.argmax())))
    return total / len(data), chosen


def choose(config: Any, folder: Path, packs: list[Tensor], examples: Examples, labels: Candidates) -> dict[str, Any]:
    """What `train` returns, and the choices of an evaluation before it."""
    from finhpc.models.files.source import open_weights
    from finhpc.models.lora.model import LoraModel
    from finhpc.training.engine import Engine
    from finhpc.training.finetuning.batches import PackedBatches
    from finhpc.training.finetuning.choices import evaluate, held_out_choices

    lora_model = LoraModel.of(config, open_weights(folder, low_rank=True))
    engine = Engine(config, lora_model.hf_config, torch.device("cpu"), lora_model=lora_model)
    source = PackedBatches(examples, Batches(config.parallel, 0, candidates=labels), labels=labels)
    figures = evaluate(engine, source, lambda choices: len(choices) / 100)
    choices = held_out_choices(engine, source)
    return train(config, folder, packs, 1) | {"figures": figures, "choices": choices}


@pytest.mark.parametrize(
    ("make", "stages", "replicas", "answers"),
    [
        (tiny_llama, 1, 1, [SINGLE, SINGLE]),
        (tiny_llama, 2, 2, [SINGLE, SEVERAL]),
        (tiny_gpt2, 2, 1, [SEVERAL, SEVERAL]),
        (partial(tiny, "Gemma 2"), 1, 2, [SINGLE, SEVERAL]),
    ],
)
def test_losses_gradients_and_choices_are_those_of_a_plain_loop(
    tmp_path: Path, make: Any, stages: int, replicas: int, answers: list[list[Answer]]
) -> None:
    folder, data = saved(make(), tmp_path / "base"), arrays(8, answers)
    config = settings(folder, stages, replicas, dora=False)
    config.parallel.micro_batch_size = 8 // PACKS
    weights = {tuple(labels): weights_of(labels) for labels in answers}
    labels = Candidates(dict(enumerate(answers)), SMOOTHING, weights)
    batches = Batches(config.parallel, 0, candidates=labels)
    packs = [torch.from_numpy(batch["pack"]) for replica in range(replicas) for batch in batches.step(data, 0, replica)]
    found = run_processes(choose, stages * replicas, config, folder, packs, Examples(data, data), labels)
    start, grads = ({n: v for rank in found for n, v in rank[key].items()} for key in ("start", "grads"))
    model = peft_model(folder, start)
    loss, chosen = plain(model, data, answers, learned=True)
    with torch.no_grad():
        held_out, _ = plain(model, data, answers, learned=False)
    loss.backward()
    trained = peft_parameters(model)
    torch.nn.utils.clip_grad_norm_(trained.values(), 0.1)
    for rank in found:
        assert rank["losses"][0] == pytest.approx(loss.item(), rel=1e-5)
        of_evaluation, choices = rank["choices"]
        assert of_evaluation == pytest.approx(held_out.item(), rel=1e-5)
        assert choices == dict(enumerate(chosen))
        assert rank["figures"]["val_loss"] == of_evaluation
        assert rank["figures"]["val_weighted_f1"] == 0.08
    assert set(grads) == set(trained)
    for name, p in trained.items():
        assert (grads[name] - p.grad).norm() <= 2e-5 * p.grad.norm(), name


@pytest.mark.parametrize("cap", [None, 3.0])
def test_loss_and_gradients_by_definition_in_float64(cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two examples: of three candidates (1, 2 and 3 tokens) and of two single ones, with weights and smoothing."""
    monkeypatch.setitem(module.LOGITS_BYTES, "cpu", 400)  # two rows at a time
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    rows, tokens, of = [0, 0, 1, 0, 2, 3, 5, 5], [4, 9, 5, 6, 7, 8, 1, 2], [0, 1, 1, 2, 2, 2, 3, 4]
    shares = [0.1, 1.5, 0.1, 0.25, 0.75]
    candidates = Rows(
        *(torch.tensor(numbers) for numbers in (rows, tokens, of, [2, 4, 5], [0, 0, 0, 1, 1], [0, 1, 2, 0, 1])),
        torch.tensor(shares),
        examples=2,
        most=3,
    )
    logits = hidden @ weight.T
    log_probs = (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)
    scores = [sum(log_probs[r, t] for r, t, c in zip(rows, tokens, of, strict=True) if c == i) for i in range(5)]
    wanted = torch.tensor(0.0, dtype=torch.float64)
    for places in ([0, 1, 2], [3, 4]):
        chosen = torch.stack([scores[i] for i in places]).log_softmax(0)
        wanted = wanted - sum(np.float32(shares[i]).item() * chosen[k] for k, i in enumerate(places))
    found = label_loss(hidden, weight, candidates, cap)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(wanted, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_single_tokens_cost_no_tokens_and_a_prompt_may_be_shorter_than_its_labels() -> None:
    data = arrays(4, [SINGLE, SINGLE])
    plain_packs, chosen = Batches(Parallel(), 0), Batches(Parallel(), 0, candidates=Candidates({0: SINGLE, 1: SINGLE}))
    (answers,), (labels,) = (batches.step(data, 0, 0) for batches in (plain_packs, chosen))
    assert (labels["pack"][0, :FIELDS] == answers["pack"][0]).all()

    many: list[Answer] = [(token,) for token in range(20)]
    short = Arrays(np.array([5, 6, 3], np.int32), np.array([0, 3]), np.array([0, 0, 1], bool), np.zeros(1, np.int32))
    (batch,) = Batches(Parallel(micro_batch_size=1), 0, candidates=Candidates({0: many})).step(short, 0, 0)
    assert batch["pack"].shape[2] == 20
