"""Opens a model to generate text: tokenizer, adapters, fast layers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finhpc.errors import ConfigError
from finhpc.generation.adapters import parse_adapter, read_adapters, resolve_adapter_model
from finhpc.generation.decode import passes
from finhpc.generation.decoder import Decoder
from finhpc.generation.fast_layers import use_fast_layers
from finhpc.generation.prompts import Prompt
from finhpc.generation.requests import Request, Token
from finhpc.models.constant import PACKED
from finhpc.models.families.registry import context_of
from finhpc.models.files.source import config_of, find_tokenizer, locate, tokenizer_of
from finhpc.models.files.tokenizer import has_tokenizer
from finhpc.models.files.tokens import check_rows, decoded, generation_config, prompt_ids, stop_ids
from finhpc.models.loading import load_model
from finhpc.models.lora.multi_lora import Adapters, round_for
from finhpc.models.lora.peft_format import Adapter
from finhpc.settings.generate import GenerateConfig
from finhpc.settings.training import Resources

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """Counts so far. `first_token_s`: seconds from the start of the first batch to its first token."""

    prompts: int = 0
    prompts_cut: int = 0
    tokens_cut: int = 0
    new_tokens: int = 0
    decode_s: float = 0.0
    first_token_s: float | None = None
    cache_bytes: int = 0


@dataclass(frozen=True)
class Inputs:
    """What generation needs besides weights.

    `path`: a model folder or GGUF file. `config`: transformers' config. `folders`, `tokenizers`: of the model (None)
    and of each adapter. `adapters`: by name.
    """

    path: Path
    config: Any
    folders: dict[str | None, Path]
    tokenizers: dict[str | None, Any]
    adapters: dict[str, Adapter]


def open_inputs(config: GenerateConfig) -> Inputs:
    """Check the model, its tokenizers and adapters; raises `ConfigError` with every misfit."""
    path = locate(config.model)
    own = config_of(path)
    if path.is_dir() and not has_tokenizer(path):
        raise ConfigError(f"model={path} has no tokenizer; copy the tokenizer's files into that folder.")
    adapters = read_adapters(config.adapters, own, path) if config.adapters else {}
    if config.sampling.max_new_tokens >= context_of(own):
        raise ConfigError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} leaves no room for a prompt in the model's "
            f"context of {context_of(own)} tokens; use fewer."
        )
    folders = {None: path} | dict(map(parse_adapter, config.adapters))
    return Inputs(path, own, folders, _tokenizers(folders, own.vocab_size), adapters)


@dataclass(frozen=True)
class Opened:
    """A model that is ready to generate. `tokenizers`, `stop`: of the model (None) and of each adapter.

    `read`: the adapters that are attached, as they were read.
    """

    model: Any
    decoder: Decoder
    adapters: Adapters
    read: dict[str, Adapter]
    tokenizers: dict[str | None, Any]
    stop: dict[str | None, set[int]]
    fast_layers: dict[str, int]
    model_bytes: int


def open_model(config: GenerateConfig) -> Opened:
    """Open `config.model`. Raises `ConfigError` with every misfit, `CheckpointError` if files are damaged."""
    config = resolve_adapter_model(config)
    device = _device(config.resources)
    inputs = open_inputs(config)
    model: Any = load_model(inputs.path, _dtype(config, inputs.config, device), device)
    if device.type == "cpu":
        copy_mapped_weights(model)
    round_for(model, inputs.adapters)
    fast_layers = use_fast_layers(model)
    model_bytes = tensor_bytes(model)
    adapters = Adapters(model, inputs.adapters)
    stop = {
        name: set(stop_ids(inputs.tokenizers[name], model.generation_config, generation_config(path)))
        for name, path in inputs.folders.items()
    }
    return Opened(model, Decoder(model), adapters, inputs.adapters, inputs.tokenizers, stop, fast_layers, model_bytes)


class Generator:
    """Opens `config.model`, see `open_model`, and continues prompts with `config.sampling`."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config = resolve_adapter_model(config)
        opened = open_model(config)
        self.model, self.decoder, self.adapters = opened.model, opened.decoder, opened.adapters
        self.tokenizers, self.fast_layers, self.model_bytes = opened.tokenizers, opened.fast_layers, opened.model_bytes
        self.stop: set[int] = set().union(*opened.stop.values()) if config.sampling.stop_at_eos else set()
        self.counts = Counts()

    def encode(self, text: str, adapter: str | None = None) -> list[int]:
        """Return the ids of a prompt, as in finetuning and evaluation; an empty one starts like a document.

        If the prompt and max_new_tokens exceed the context, its beginning is cut; that is counted and reported.
        """
        return self.fit(prompt_ids(self.tokenizers[adapter], text))

    def fit(self, ids: list[int]) -> list[int]:
        rows = self.model.config.vocab_size
        if (largest := max(ids)) >= rows:  # a padding token in the text
            raise ConfigError(f"a prompt holds the id {largest:,}, but the model has rows for {rows:,}; correct it.")
        room = self.decoder.context - self.config.sampling.max_new_tokens
        if (over := len(ids) - room) > 0:
            self.counts.prompts_cut += 1
            self.counts.tokens_cut += over
            log.info(f"a prompt of {len(ids)} tokens was cut to its last {room}: its context is full")
        return ids[-room:]

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, list[int], str]]:
        """Yield each prompt with its new ids and text, in order; at most `config.batch` are computed at once."""
        encoded = [self.encode(prompt.text, prompt.adapter) for prompt in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        ended: set[int] = set()
        done = 0
        for token in self._tokens(encoded, [prompt.adapter for prompt in prompts]):
            place = int(token.request)
            new[place] += [] if token.id is None else [token.id]
            ended |= set() if token.finish is None else {place}
            while done in ended:
                yield prompts[done], new[done], self.text(encoded[done], new[done], prompts[done].adapter)
                done += 1

    def _tokens(self, prompts: Sequence[list[int]], adapters: Sequence[str | None]) -> Iterator[Token]:
        """Yield the tokens of requests that are named by their places, and count them."""
        begin, first, sampling = time.perf_counter(), self.counts.prompts, self.config.sampling
        requests = [
            Request(str(i), ids, adapter, sampling, stop=self.stop, row=first + i)
            for i, (ids, adapter) in enumerate(zip(prompts, adapters, strict=True))
        ]
        for tokens in passes(self.decoder, requests, self.config.batch, self.config.cache, self.adapters):
            if self.counts.first_token_s is None and tokens:
                self.counts.first_token_s = time.perf_counter() - begin
            self.counts.new_tokens += len(tokens)
            yield from tokens
        self.counts.prompts += len(prompts)
        self.counts.decode_s += time.perf_counter() - begin
        self.counts.cache_bytes = max(self.counts.cache_bytes, self.decoder.cache_bytes)

    def text(self, before: list[int], ids: list[int], adapter: str | None) -> str:
        """Return the text of `ids` after the prompt `before`, so that the two join, without the end token."""
        ended = bool(ids) and ids[-1] in self.stop
        return decoded(self.tokenizers[adapter], before, ids[:-1] if ended else ids)

    def stream_text(self, ids: list[int], adapter: str | None, write: Callable[[str], object]) -> str:
        """Generate after `ids` and write each piece of text as soon as it is complete; returns the whole text."""
        new: list[int] = []
        written = ""
        for token in self._tokens([ids], [adapter]):
            new += [] if token.id is None else [token.id]
            text = self.text(ids, new, adapter)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # part of a character
                write(text[len(written) :])
                written = text
        text = self.text(ids, new, adapter)
        write(text[len(written) :])
        return text


def _tokenizers(folders: dict[str | None, Path], rows: int) -> dict[str | None, Any]:
    """Return the tokenizer of the model (None) and of each adapter: its own if it has one, otherwise the model's."""
    tokenizers: dict[str | None, Any] = {}
    problems: list[str] = []
    for name, folder in folders.items():
        try:
            tokenizer = tokenizer_of(folder) if name is None else find_tokenizer(folder)
            if tokenizer is not None:
                check_rows(tokenizer, rows, f"model={folder}" if name is None else f"the base of adapter={folder}")
            tokenizers[name] = tokenizer or tokenizers.get(None)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tokenizers


def tensor_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all weights, their scales and buffers, counting shared memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [scale for parameter in model.parameters() for scale in _scales(parameter)]
    packed = [x for x in tensors if x.layout == PACKED]  # without a storage that torch knows
    plain = [x.untyped_storage() for x in tensors if x.layout != PACKED]
    return sum(x.nbytes for x in packed) + sum({x.data_ptr(): x.nbytes() for x in plain}.values())


def _scales(parameter: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that bitsandbytes attaches to the codes of a weight."""
    state = getattr(parameter, "quant_state", None)
    tensors = [getattr(parameter, "SCB", None)]
    tensors += [state.absmax, state.code] if state else []
    tensors += [state.state2.absmax, state.state2.code] if state and state.nested else []
    return [tensor for tensor in tensors if tensor is not None]


@torch.no_grad()
def copy_mapped_weights(model: torch.nn.Module) -> None:
    """Copy weights out of mapped files, one at a time, so that the files' pages can leave memory.

    Otherwise weights that are changed in place would take memory twice. bitsandbytes builds its own copies.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())


def _dtype(config: GenerateConfig, model_config: Any, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    own = model_config.dtype or torch.float32
    if own == torch.float16 and device.type == "cpu":
        log.info("weights are float16, which CPUs compute slowly; computing in float32")
        return torch.float32
    return own  # type: ignore[no-any-return]


def _device(resources: Resources) -> torch.device:
    cuda = torch.cuda.is_available()
    if resources.device == "cuda" and not cuda:
        raise ConfigError("resources.device=cuda, but torch sees no GPU; use resources.device=cpu.")
    torch.set_num_threads(resources.threads)
    return torch.device("cuda" if cuda and resources.device != "cpu" else "cpu")
