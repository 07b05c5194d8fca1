"""The models of a server by their names in the API: the base, and its adapters, which come and go."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finhpc.data.examples.chat import control_tokens, prompt_text, rendered_ids
from finhpc.errors import ConfigError, FinhpcError
from finhpc.generation.adapters import parse_adapter, read_adapters
from finhpc.generation.generator import Opened
from finhpc.models.families.registry import context_of
from finhpc.models.files.source import find_tokenizer
from finhpc.models.files.tokens import check_rows, generation_config, prompt_ids, stop_ids
from finhpc.models.lora.peft_format import Adapter
from finhpc.screen import counted
from finhpc.serving.engine import Engine
from finhpc.serving.protocol import ApiError, Message
from finhpc.serving.shared import Shared
from finhpc.serving.texts import TokenTexts
from finhpc.settings.serve import Limits, ServeConfig

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass
class Model:
    """A model in the API. `adapter`: its name; None: the base. `folder`: the adapter's."""

    id: str
    adapter: str | None
    tokenizer: Any
    stop: frozenset[int]
    rows: int
    context: int
    limits: Limits
    folder: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the tokenizer, for one thread at a time

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.tokenizer)

    def prompt_ids(self, prompt: str | Sequence[Any]) -> list[list[int]]:
        """Return the ids of each prompt: of a text, as `finhpc generate` reads it. Raises `ApiError`."""
        prompts: Sequence[Any] = [prompt] if isinstance(prompt, str) else prompt
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not prompts:
            raise ApiError(400, "prompt is an empty list; give a text or ids.", "invalid_value", "prompt")
        if len(prompts) > self.limits.max_choices:
            text = f"{len(prompts)} prompts exceed {self.limits.max_choices} answers; send fewer in one request."
            raise ApiError(400, text, "invalid_value", "prompt")
        return [self._encoded(one) if isinstance(one, str) else self._checked(one) for one in prompts]

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, as the tokenizer's chat template writes it. Raises `ApiError`."""
        if not self.tokenizer.chat_template:
            text = f"The model {self.id} has no chat template; use /v1/completions, or a model that was made for chats."
            raise ApiError(400, text, "no_chat_template", "messages")
        plain = [message.plain for message in messages]
        control = control_tokens(self.tokenizer)
        for number, message in enumerate(plain, 1):
            if token := next((token for token in control if token in message["content"]), None):
                text = f"Message {number} holds the special token {token}; remove it from the text."
                raise ApiError(400, text, "invalid_value", "messages")
        try:
            with self.lock:
                return rendered_ids(prompt_text(plain, self.tokenizer), self.tokenizer)
        except ConfigError as error:
            raise ApiError(400, str(error), "invalid_value", "messages") from None

    def text_of(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def room(self, ids: Sequence[int], most: int | None, default: int | None, echo: bool) -> int:
        """Return how many new tokens a request may get. Raises `ApiError` if the prompt or they are too many."""
        limits, left = self.limits, self.context - len(ids)
        longest = self.context if limits.max_prompt_tokens is None else min(limits.max_prompt_tokens, self.context)
        if len(ids) > longest or left < (0 if most == 0 else 1):
            text = (
                f"The prompt has {len(ids):,} tokens, and the limit is {longest:,} with room for new ones; shorten it."
            )
            raise ApiError(400, text, "context_length_exceeded", "prompt")
        if most is None:
            return min(left, limits.max_new_tokens, default or left)
        if most > left:
            prompt = counted(len(ids), "token")
            text = f"The prompt's {prompt} and {most:,} new ones exceed the context of {self.context:,}"
            raise ApiError(400, f"{text}; ask for fewer.", "context_length_exceeded", "max_tokens")
        if most > limits.max_new_tokens or (most == 0 and not echo):
            text = f"max_tokens={most} is not between 1 and {limits.max_new_tokens:,} (0: only with echo); correct it."
            raise ApiError(400, text, "invalid_value", "max_tokens")
        return most

    def _encoded(self, text: str) -> list[int]:
        try:
            with self.lock:
                return self._checked(prompt_ids(self.tokenizer, text))
        except ConfigError as error:
            raise ApiError(400, str(error), "invalid_value", "prompt") from None

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids or min(ids) < 0 or max(ids) >= self.rows:
            text = f"A prompt is empty or has ids that are not between 0 and {self.rows - 1:,}; correct it."
            raise ApiError(400, text, "invalid_value", "prompt")
        return ids


class Served:
    """The models of a replica. `path`: the base; `opened`: it and the adapters of the start, in memory."""

    def __init__(self, config: ServeConfig, path: Path, opened: Opened, engine: Engine, shared: Shared) -> None:
        self.config, self.path, self.opened, self.engine, self.shared = config, path, opened, engine, shared
        self.limits, self.base = config.limits, model_name(config)
        given = dict(map(parse_adapter, config.adapters))
        self.models = {self.base: self._model(self.base, None, opened.tokenizers[None], opened.stop[None])}
        for name, folder in given.items():
            self._serve(name, str(folder), opened.tokenizers[name], opened.stop[name])
        self.refused: dict[str, str] = {}  # name of a listed adapter that cannot be served -> why
        self._roots = [folder.resolve() for folder in (*map(Path, config.adapter_root), *given.values())]
        self._changing = asyncio.Lock()
        self._stamp: tuple[int, int] | None = None

    async def find(self, name: str) -> Model:
        """Return a model by its name in the API. Raises `ApiError` for an unknown one."""
        await self.follow()
        if name not in self.models and name.startswith(f"{self.base}:"):
            await self.follow(again=True)  # a stamp may lag behind the list on a network disk
        if name in self.models:
            return self.models[name]
        known = ", ".join(list(self.models)[:20])
        reason = self.refused.get(name.removeprefix(f"{self.base}:"), f"there are: {known}.")
        raise ApiError(404, f"The model {name[:100]} does not exist; {reason}", "model_not_found", "model")

    async def follow(self, again: bool = False) -> None:
        """Load and remove adapters as the list of all replicas says, if it changed."""
        stamp = self.shared.stamp()
        if stamp == self._stamp and not again:
            return
        async with self._changing:
            self._stamp = stamp
            try:
                listed = await asyncio.to_thread(self.shared.adapters)
            except FinhpcError as error:
                log.warning(f"the adapters stay as they are: {error}")
                return
            for name, model in self._adapters().items():
                if listed.get(name) != model.folder:
                    self._remove(name)
            self.refused = {}
            for name, folder in listed.items():
                if name not in self._adapters():
                    try:
                        await asyncio.to_thread(self._load, name, folder)
                    except FinhpcError as error:
                        self.refused[name] = str(error)
                        log.warning(f"the adapter {name} is not served: {error}")

    async def load(self, name: str, folder: str) -> None:
        """Serve another adapter, on all replicas. Raises `ApiError`."""
        if not NAME.fullmatch(name):
            text = f"{name[:80]!r} is not a name of letters, digits, '.', '_' and '-'; choose another."
            raise ApiError(400, text, "invalid_value", "lora_name")
        place = await asyncio.to_thread(self._allowed, folder)
        await self.follow(again=True)
        async with self._changing:
            if name in self._adapters():
                raise ApiError(400, f"The adapter {name} is loaded already; unload it first.", "loaded", "lora_name")
            try:
                await asyncio.to_thread(self._load, name, place)
            except FinhpcError as error:
                raise ApiError(400, str(error), "adapter_refused", "lora_path") from None
            await asyncio.to_thread(self._list, name, place)

    async def unload(self, name: str) -> None:
        """Serve an adapter no more, on all replicas; its running requests end as usual. Raises `ApiError`."""
        await self.follow(again=True)
        async with self._changing:
            if name not in self._adapters() and name not in self.refused:
                raise ApiError(404, f"The adapter {name[:80]} is not loaded.", "model_not_found", "lora_name")
            await asyncio.to_thread(self._list, name, None)
            self.refused.pop(name, None)
            if name in self._adapters():
                self._remove(name)

    def _adapters(self) -> dict[str, Model]:
        """The adapters by their own names."""
        return {id.removeprefix(f"{self.base}:"): each for id, each in self.models.items() if each.folder is not None}

    def _list(self, name: str, folder: str | None) -> None:
        with self.shared.changing() as listed:
            listed.pop(name, None)
            if folder is not None:
                listed[name] = folder
        self._stamp = None  # compared with the list at the next request

    def _allowed(self, folder: str) -> str:
        place = Path(folder).expanduser().resolve()  # where links lead
        if not any(place.is_relative_to(root) for root in self._roots):
            text = f"{folder[:200]} is not below a folder that the server may load adapters from (adapter_root)."
            raise ApiError(400, text, "adapter_refused", "lora_path")
        return str(place)

    def _load(self, name: str, folder: str) -> None:
        """Check an adapter and give it to the batcher."""
        if len(self._adapters()) >= self.limits.max_adapters:
            raise ConfigError(f"limits.max_adapters={self.limits.max_adapters} are loaded; unload one first.")
        adapter = read_adapters([f"{name}={folder}"], self.opened.model.config, self.path)[name]
        check_rank(name, adapter, self.limits)
        tokenizer = find_tokenizer(Path(folder)) or self.opened.tokenizers[None]
        check_rows(tokenizer, self.opened.model.config.vocab_size, f"the base of adapter={folder}")
        stop = stop_ids(tokenizer, self.opened.model.generation_config, generation_config(Path(folder)))
        self.engine.batcher.add_adapter(name, adapter)
        self._serve(name, folder, tokenizer, stop)

    def _serve(self, name: str, folder: str, tokenizer: Any, stop: Collection[int]) -> None:
        id = f"{self.base}:{name}"
        self.models[id] = self._model(id, name, tokenizer, stop, folder)

    def _model(
        self, id: str, adapter: str | None, tokenizer: Any, stop: Collection[int], folder: str | None = None
    ) -> Model:
        config, ends = self.opened.model.config, frozenset(stop) | self.opened.stop[None]
        return Model(id, adapter, tokenizer, ends, config.vocab_size, context_of(config), self.limits, folder)

    def _remove(self, name: str) -> None:
        del self.models[f"{self.base}:{name}"]
        self.engine.batcher.remove_adapter(name)


def check_rank(name: str, adapter: Adapter, limits: Limits) -> None:
    """Raise `ConfigError` if an adapter's rank is higher than the server allows."""
    rank = max((len(a) for a, _ in adapter.pairs.values()), default=0)
    if rank > limits.max_adapter_rank:
        raise ConfigError(
            f"adapter={name} has rank {rank}, and limits.max_adapter_rank={limits.max_adapter_rank}; start the server "
            f"with --limits.max_adapter_rank {rank}, which takes more memory and time."
        )


def model_name(config: ServeConfig) -> str:
    """Return the base's name in the API: `name`, or the part of its path that tells the most."""
    parts = [part for part in Path(config.model.rstrip("/")).parts if part not in ("model", "/")]
    return config.name or (parts[-1] if parts else "model")
