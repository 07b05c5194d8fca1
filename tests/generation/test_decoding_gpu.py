"""Generation on a GPU: the ids with a cache, without one, and of transformers' own generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.commands.export import export
from finhpc.generation.adapters import read_adapters
from finhpc.generation.decode import decode
from finhpc.generation.decoder import Decoder
from finhpc.generation.fast_layers import use_fast_layers
from finhpc.models.loading import load_model
from finhpc.models.lora.multi_lora import Adapters
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.generate import Sampling
from finhpc.settings.pretrain import Qkv
from tests.generation.folders import tiny_adapter, tiny_folder, tiny_model
from tests.generation.test_batching import (
    GREEDY,
    assert_nothing_is_lost,
    assert_rows_have_their_adapters,
    batcher_of,
    ids_of,
    prompts_of,
    requests_of,
    served,
)
from tests.generation.test_decoding import MODELS, generated
from tests.gpu import DEVICE, needs_gpu

pytestmark = needs_gpu

NEW = 24
PROMPT = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(1))
LLAMA = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def assert_ids_agree(model: Any) -> None:
    sampling, prompt = Sampling(max_new_tokens=NEW), PROMPT.to(DEVICE)
    with torch.inference_mode():
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, pad_token_id=0)
    ids = generated(model, PROMPT.tolist(), sampling)
    assert generated(model, PROMPT.tolist(), sampling, cache=False) == ids
    assert ids == [theirs[0, 20:].tolist()]
    assert len(set(ids[0])) > 2


@pytest.mark.parametrize(("family", "kind", "qkv"), MODELS)
def test_ids_are_transformers_own(family: str, kind: str, qkv: Qkv) -> None:
    model = tiny_model(family, kind, qkv=qkv)
    plain = generated(model, PROMPT.tolist(), Sampling(max_new_tokens=NEW))
    assert_ids_agree(model.to(DEVICE))
    assert generated(model, PROMPT.tolist(), Sampling(max_new_tokens=NEW)) == plain, "and the CPU's"


@pytest.mark.parametrize(("bits", "scheme"), [(8, "minmax"), (4, "minmax"), (8, "int8"), (4, "nf4")])
@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_ids_of_quantised_models_are_transformers_own(tmp_path: Path, kind: str, bits: int, scheme: str) -> None:
    source, out = tiny_folder(tmp_path / "model", "llama", kind, tokenizer=False), tmp_path / "q"
    tree = {"model": str(source), "out": str(out), "quantization": {"bits": bits, "scheme": scheme}}
    export(build(ExportConfig, tree))
    model: Any = load_model(out, device=DEVICE)
    use_fast_layers(model)
    assert_ids_agree(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_gives_the_same_beside_longer_ones(family: str) -> None:
    model, sampling = tiny_model(family).to(DEVICE), Sampling(max_new_tokens=20)
    prompts = [list(range(5)), list(range(40, 80)), [7], list(range(30))]
    alone = [generated(model, [prompt], sampling)[0] for prompt in prompts]
    assert generated(model, prompts, sampling) == alone
    assert generated(model, prompts, sampling, cache=False) == alone


def test_each_row_goes_through_its_own_adapter(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "llama", tokenizer=False)
    given = [
        f"a{i}={tiny_adapter(tmp_path / f'a{i}', tiny_model('llama'), LLAMA[: 1 + i % 2], 2 + i, seed=i)}"
        for i in range(3)
    ]
    model: Any = load_model(source, device=DEVICE)
    adapters = Adapters(model, read_adapters(given, model.config, source))
    names = ["a2", None, "a0", "a1", "a0"]
    prompts, sampling = [[3 + i, 1, 4] for i in range(len(names))], Sampling(max_new_tokens=12)
    mixed = generated(model, prompts, sampling, adapters=adapters, names=names)
    for name, prompt, ids in zip(names, prompts, mixed, strict=True):
        adapters.select([name])
        assert generated(model, [prompt], sampling) == [ids], name
    adapters.select([None])
    assert generated(model, prompts[:1], sampling) != mixed[:1]


def test_draws_are_the_cpus() -> None:
    model, sampling = tiny_model("gpt2"), Sampling(max_new_tokens=12, temperature=1.5, top_k=50, top_p=0.9, seed=3)
    prompts = [[1, 2, 3], [4, 5, 6]]
    plain = list(decode(Decoder(model), prompts, sampling))
    decoder = Decoder(model.to(DEVICE))
    assert list(decode(decoder, prompts, sampling)) == plain
    assert list(decode(decoder, prompts, sampling, cache=False)) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "kind", "qkv"), MODELS)
def test_batches_over_a_paged_cache_give_the_ids_of_each_request(
    family: str, kind: str, qkv: Qkv, dtype: torch.dtype
) -> None:
    model, prompts = tiny_model(family, kind, qkv=qkv).to(DEVICE, dtype), prompts_of()
    alone = [generated(model, [prompt], GREEDY)[0] for prompt in prompts]
    for settings in ({}, {"blocks": 8}):
        batcher = batcher_of(model, **settings)
        assert batcher.cache.data.dtype == dtype
        assert batcher.cache.data.is_cuda
        found = ids_of(served(batcher, requests_of(prompts), every=1))
        if dtype == torch.float32:
            assert found == alone
        assert_nothing_is_lost(batcher)


def test_a_paged_batch_mixes_adapters(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "llama", tokenizer=False)
    assert_rows_have_their_adapters(load_model(source, device=DEVICE), source, tmp_path)
