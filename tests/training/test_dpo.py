"""Direct preference optimization: loss and gradients against TRL's formula, the reference, and a whole run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from finhpc.data.examples.batches import Batches
from finhpc.data.examples.choices.preferences import Preferences
from finhpc.data.examples.examples import Arrays, Examples
from tests.commands.test_finetune import config as finetuning
from tests.data.instructing import jsonl
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.models.packs import peft_model, peft_parameters
from tests.tiny import WORDS, with_tokenizer
from tests.training.processes import run_processes
from tests.training.test_adapting import PACKS, settings, train
from tests.training.test_best import of_evaluations, trained

BETA, SMOOTHING = 0.3, 0.1
Pair = tuple[list[int], list[int], list[int]]


def pairs(count: int) -> list[Pair]:
    """Prompts with a common beginning, a chosen and a rejected answer of different lengths."""
    draw = np.random.default_rng(0)
    return [
        (
            [*range(20, 30), *draw.integers(30, 300, 2 + i % 4).tolist()],
            draw.integers(30, 300, 1 + i % 3).tolist(),
            draw.integers(30, 300, 1 + i % 5).tolist(),
        )
        for i in range(count)
    ]


def arrays(given: list[Pair]) -> Arrays:
    lengths = [sum(map(len, pair)) for pair in given]
    return Arrays(
        np.array([token for pair in given for side in pair for token in side], np.int32),
        np.cumsum([0, *lengths]),
        np.array([place == 1 for pair in given for place, side in enumerate(pair) for _ in side]),
        np.zeros(len(given), np.int32),
    )


def log_likelihoods(model: Any, given: list[Pair]) -> Tensor:
    """(pairs, 2): of both answers after their prompt, one sequence at a time."""
    rows = []
    for prompt, *answers in given:
        for answer in answers:
            log_probs = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            rows.append(log_probs[range(len(answer)), answer].sum())
    return torch.stack(rows).view(-1, 2)


def dpo(policy: Tensor, reference: Tensor, smoothing: float) -> Tensor:
    """TRL's `DPOTrainer`, loss_type="sigmoid": mean over pairs, from log-likelihoods (pairs, 2)."""
    ratios = policy - reference
    logits = ratios[:, 0] - ratios[:, 1]
    return (-F.logsigmoid(BETA * logits) * (1 - smoothing) - F.logsigmoid(-BETA * logits) * smoothing).mean()


def learn(config: Any, folder: Path, packs: list[Tensor], examples: Examples, out: Path) -> dict[str, Any]:
    """What `train` returns, and the scores of the reference pass and the figures of an evaluation before it."""
    from finhpc.models.files.source import open_weights
    from finhpc.models.lora.model import LoraModel
    from finhpc.training.engine import Engine
    from finhpc.training.finetuning.batches import PackedBatches
    from finhpc.training.finetuning.choices import evaluate_pairs
    from finhpc.training.finetuning.reference import begin_with_reference

    lora_model = LoraModel.of(config, open_weights(folder, low_rank=True))
    engine = Engine(config, lora_model.hf_config, torch.device("cpu"), lora_model=lora_model)
    preferences = Preferences(BETA, SMOOTHING)
    source = PackedBatches(examples, Batches(config.parallel, 0, candidates=preferences))
    begin_with_reference(engine, source, out)
    figures = evaluate_pairs(engine, source)
    return train(config, folder, packs, 1) | {"reference": preferences.reference, "figures": figures}


@pytest.mark.parametrize(("make", "stages", "replicas"), [(tiny_llama, 1, 1), (tiny_llama, 2, 2), (tiny_gpt2, 2, 1)])
def test_loss_and_gradients_are_those_of_trl(tmp_path: Path, make: Any, stages: int, replicas: int) -> None:
    base = make().eval()
    folder, given = saved(base, tmp_path / "base"), pairs(8)
    data = arrays(given)
    with torch.no_grad():
        reference = log_likelihoods(base, given)
    config = settings(folder, stages, replicas, dora=False)
    config.parallel.micro_batch_size = 8 // PACKS
    preferences = Preferences(BETA, SMOOTHING, {name: reference.numpy() for name in ("train", "held_out")})
    batches = Batches(config.parallel, 0, candidates=preferences)
    packs = [torch.from_numpy(batch["pack"]) for replica in range(replicas) for batch in batches.step(data, 0, replica)]
    found = run_processes(learn, stages * replicas, config, folder, packs, Examples(data, data), tmp_path)
    start, grads = ({n: v for rank in found for n, v in rank[key].items()} for key in ("start", "grads"))
    model = peft_model(folder, start)
    policy = log_likelihoods(model, given)
    loss = dpo(policy, reference, SMOOTHING)
    loss.backward()
    trained_ones = peft_parameters(model)
    torch.nn.utils.clip_grad_norm_(trained_ones.values(), 0.1)
    apart = (policy[:, 0] - policy[:, 1]).detach()
    for rank in found:
        assert rank["losses"][0] == pytest.approx(loss.item(), rel=1e-5)
        for scores in rank["reference"].values():  # of the adapted model, up to a constant of each pair
            torch.testing.assert_close(torch.tensor(scores[:, 0] - scores[:, 1]).float(), apart, rtol=0, atol=1e-4)
        assert rank["figures"]["val_loss"] == pytest.approx(math.log(2), rel=1e-5), "it is its own reference"
    assert set(grads) == set(trained_ones)
    for name, p in trained_ones.items():
        assert (grads[name] - p.grad).norm() <= 2e-5 * p.grad.norm(), name
    again = Preferences(BETA)
    again.load(tmp_path)
    assert np.array_equal(again.reference["train"], found[0]["reference"]["train"])


def test_a_run_learns_what_is_preferred_and_resumes_to_the_bit(run_shards: Path, tmp_path: Path) -> None:
    base = with_tokenizer(saved(tiny_llama(context=256), tmp_path / "base"), run_shards)
    records = [
        {"prompt": f"{WORDS[i % 7]} {i}", "chosen": f"{WORDS[0]} {i}", "rejected": f"{WORDS[1]} {i}"} for i in range(40)
    ]
    file = jsonl(tmp_path / "pairs.jsonl", records)
    every = {"steps": 6, "eval_every": 2, "checkpoint_every": 2, "keep_checkpoints": 9}
    data = {"loss": "preferences", "beta": 0.5, "eval_fraction": 0.2}
    rate = {"lr": 1e-2, "warmup_steps": 0}
    run = tmp_path / "run"
    learning = finetuning(base, Path(file), tmp_path, data=data, train=every, optimizer=rate)
    result, val = trained(learning, run), of_evaluations(run, "val_loss")
    assert val[6] < val[2] < math.log(2)
    assert of_evaluations(run, "val_reward_accuracy")[6] == 1.0
    assert result["scores"] is None or not result["scores"], "answers of pairs are no labels"
    weights = load_file(run / "model" / "adapter_model.safetensors")
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    again = trained(learning, run)
    assert again["resumed_from_step"] == 2
    assert of_evaluations(run, "val_loss") == val
    resumed = load_file(run / "model" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
