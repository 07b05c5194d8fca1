"""The decoder beside transformers' own generate; what the cache saves; how tokens are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finhpc.errors import NonFiniteError
from finhpc.generation.decode import decode
from finhpc.generation.decoder import Decoder
from finhpc.generation.sampling import choose, row_seed
from finhpc.settings.generate import Sampling
from finhpc.settings.pretrain import Qkv
from tests.generation.folders import tiny_model
from tests.models.dense import tiny_mistral, tiny_qwen2

MODELS: list[tuple[str, str, Qkv]] = [
    ("gpt2", "dense", "joint"),
    ("gpt2", "low_rank", "joint"),
    ("gpt2", "low_rank", "separate"),
    ("gpt2", "half", "separate"),
    ("llama", "dense", "joint"),
    ("llama", "low_rank", "joint"),
    ("llama", "cola", "joint"),
]


def generated(model: Any, prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[list[int]]:
    rows = zip(*decode(Decoder(model), prompts, sampling, **options), strict=True)
    return [[token for token in row if token is not None] for row in rows]


@pytest.mark.parametrize(("family", "kind", "qkv"), MODELS)
def test_greedy_ids_are_transformers_own(family: str, kind: str, qkv: Qkv) -> None:
    model = tiny_model(family, kind, qkv=qkv)
    prompt = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, pad_token_id=0)
    assert generated(model, prompt.tolist(), Sampling(max_new_tokens=30)) == [theirs[0, 20:].tolist()]


@pytest.mark.parametrize(("family", "kind", "qkv"), MODELS)
def test_the_cache_changes_no_id_and_saves_what_the_paper_counts(family: str, kind: str, qkv: Qkv) -> None:
    model = tiny_model(family, kind, qkv=qkv)
    model.config.max_position_embeddings = 128
    decoder, sampling = Decoder(model), Sampling(max_new_tokens=28)
    prompt = [list(range(100))]
    with_cache = list(decode(decoder, prompt, sampling))
    assert decoder.computed_tokens == 100 + 27
    decoder.computed_tokens = 0
    assert list(decode(decoder, prompt, sampling, cache=False)) == with_cache
    assert decoder.computed_tokens == sum(range(100, 128))


def test_100_and_100_tokens() -> None:
    from finhpc.models.families.presets import Shape
    from finhpc.models.families.registry import make_config
    from finhpc.models.initialize import initial_model
    from finhpc.settings.pretrain import LINEAR_KINDS

    config = make_config(Shape("gpt2", 1, 32, 2, 256, 300, True), dict.fromkeys(LINEAR_KINDS))
    decoder = Decoder(initial_model(config, 0, None).eval())
    found = {}
    for cache in (True, False):
        decoder.computed_tokens = 0
        ids = list(decode(decoder, [list(range(100))], Sampling(max_new_tokens=100), cache=cache))
        found[cache] = decoder.computed_tokens, ids
    assert (found[True][0], found[False][0]) == (199, 14_950)
    assert found[True][1] == found[False][1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_gives_the_same_beside_longer_ones(family: str) -> None:
    model, sampling = tiny_model(family), Sampling(max_new_tokens=20)
    prompts = [list(range(5)), list(range(40, 80)), [7], list(range(30))]
    alone = [generated(model, [prompt], sampling)[0] for prompt in prompts]
    assert generated(model, prompts, sampling) == alone
    assert generated(model, prompts, sampling, cache=False) == alone


def test_a_row_ends_at_a_stop_id_and_the_batch_with_the_last_row() -> None:
    model, sampling = tiny_model("gpt2"), Sampling(max_new_tokens=20)
    prompts = [[1, 2, 3], [9, 8, 7]]
    whole = generated(model, prompts, sampling)
    stop = whole[0][4]
    cut = generated(model, prompts, sampling, stop={stop})
    assert cut == [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert len(cut[0]) <= 5


def test_draws_follow_the_probabilities_that_are_left() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def shares(**settings: float) -> torch.Tensor:
        sampling = Sampling.model_validate({"temperature": 1.0, **settings})
        draws = [torch.Generator().manual_seed(i) for i in range(4000)]
        ids = torch.tensor(choose(logits.expand(4000, -1), sampling, draws))
        return torch.bincount(ids, minlength=4) / 4000

    assert shares() == pytest.approx(torch.tensor([0.5, 0.3, 0.15, 0.05]), abs=0.03)
    assert shares(top_k=2) == pytest.approx(torch.tensor([0.625, 0.375, 0, 0]), abs=0.03)
    assert shares(top_p=0.79) == pytest.approx(torch.tensor([0.625, 0.375, 0, 0]), abs=0.03)
    assert shares(top_p=0.1) == pytest.approx(torch.tensor([1.0, 0, 0, 0]))
    assert shares(temperature=1e-60) == pytest.approx(torch.tensor([1.0, 0, 0, 0]))
    cold = torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    assert shares(temperature=0.5) == pytest.approx(cold, abs=0.03)


def test_draws_depend_on_the_seed_and_the_place_not_on_the_batch() -> None:
    model, sampling = tiny_model("gpt2"), Sampling(max_new_tokens=12, temperature=5.0, seed=3)
    prompts = [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
    whole = generated(model, prompts, sampling)
    assert generated(model, prompts[1:], sampling, first=1) == whole[1:]
    assert whole[0] != whole[2]
    assert generated(model, prompts, sampling.model_copy(update={"seed": 4})) != whole


def test_seeds_and_places_draw_independently() -> None:
    model, sampling = tiny_model("gpt2"), Sampling(max_new_tokens=8, temperature=5.0)
    rows = [
        tuple(row)
        for seed in range(4)
        for row in generated(model, [[1, 2, 3]] * 6, sampling.model_copy(update={"seed": seed}))
    ]
    assert len(set(rows)) == 24, "no seed's answers are another's, one place further"
    assert len({row_seed(seed, row) for seed in range(100) for row in range(100)}) == 10_000
    assert row_seed(1, 11) != row_seed(11, 1)
    assert row_seed(11, 1) != row_seed(1, 111)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_said(temperature: float) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        generated(model, [[1, 2]], Sampling(temperature=temperature, max_new_tokens=4))


@pytest.mark.parametrize("make", [tiny_mistral, tiny_qwen2])
def test_llama_like_families_decode_as_transformers_does(make: Any) -> None:
    model = make()
    prompt = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, pad_token_id=0)
    ours = generated(model, prompt.tolist(), Sampling(max_new_tokens=theirs.shape[1] - 20))
    assert ours == [theirs[0, 20:].tolist()]
    assert len(set(ours[0])) > 2


def test_nothing_is_decoded_beyond_a_sliding_window() -> None:
    assert Decoder(tiny_mistral(window=24)).context == 24
