"""What servers are given: a model with a tokenizer, adapters, and requests of mixed lengths."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finhpc.bench.measures.generate import random_adapter, random_model
from finhpc.bench.settings import ServeBench
from finhpc.errors import ConfigError
from finhpc.models.families.presets import PRESETS
from finhpc.models.families.registry import context_of
from finhpc.models.files.manifest import weights_fingerprint
from finhpc.models.files.source import config_of, find_tokenizer, locate, open_weights
from finhpc.models.lora.average import write_adapter
from finhpc.settings.base import nearest

SHORTEST = 4  # the shortest prompt and answer have this fraction of the longest


def model_folder(settings: ServeBench, place: Path) -> Path:
    """Return the folder of the model: that of the settings, or a new one below `place` of a preset's shape."""
    if settings.model is not None:
        path = locate(settings.model)
        if find_tokenizer(path) is None:
            raise ConfigError(f"model={path} comes without a tokenizer; add the one that it was trained with.")
    elif settings.preset in PRESETS:
        path = place / "model"
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        random_model(settings.preset, None, 16, dtype, torch.device("cpu")).save_pretrained(path)
        made_tokenizer(PRESETS[settings.preset].vocab_size).save_pretrained(path)
    else:
        raise ConfigError(f"preset={settings.preset} is not a preset; {nearest(settings.preset, list(PRESETS))}")
    context = context_of(config_of(path))
    if settings.prompt + settings.new > context:
        raise ConfigError(
            f"prompt={settings.prompt} and new={settings.new} exceed the context of {context:,}; ask for fewer."
        )
    return path


def made_tokenizer(rows: int) -> Any:
    """Return a byte-level tokenizer of `rows` tokens: bytes, pairs of letters, and pairs of pairs, as merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*string.ascii_letters, "Ġ"]
    pairs = list(itertools.product(letters, repeat=2))
    longer = itertools.product(map("".join, pairs), repeat=2)
    merges = list(itertools.islice(itertools.chain(pairs, longer), rows - len(tokens)))
    tokens += map("".join, merges)
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def adapter_folders(settings: ServeBench, model: Path, place: Path) -> dict[str, Path]:
    """Write random adapters of a model and return name -> folder."""
    weights, fingerprint = open_weights(model, low_rank=True), weights_fingerprint(model)
    folders = {f"a{i}": place / f"a{i}" for i in range(settings.adapters)}
    for folder in folders.values():
        write_adapter(folder, random_adapter(weights.skeleton, settings.adapter_rank), weights, fingerprint)
    return folders


def requests_of(settings: ServeBench, models: Sequence[str], rows: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Return requests to `models` in turn, whose lengths are the same for every `seed` and whose ids are not."""
    lengths, ids, requests = random.Random(0), random.Random(f"ids {seed}"), []
    for i in range(count):
        prompt, new = (lengths.randint(-(-most // SHORTEST), most) for most in (settings.prompt, settings.new))
        prompt_ids = [ids.randrange(rows) for _ in range(prompt)]
        requests.append({"model": models[i % len(models)], "prompt": prompt_ids, "max_tokens": new})
    return requests
