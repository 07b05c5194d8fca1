"""Completions and chats: from a request to prompts for the engine, from tokens to OpenAI's answers."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from finhpc.generation.requests import Request
from finhpc.generation.sampling import Score
from finhpc.serving.engine import Tokens
from finhpc.serving.formats import ChatFormat, CompletionFormat, Format
from finhpc.serving.guard import place_of
from finhpc.serving.protocol import FAILED, ApiError, Chat, Completion, Sampled
from finhpc.serving.served import Served
from finhpc.serving.texts import Answer, Scored
from finhpc.settings.generate import Sampling
from finhpc.settings.serve import Limits

log = logging.getLogger(__name__)


@dataclass
class Choice:
    """One answer of a request. `echo`: the prompt's text, if the answer begins with it."""

    index: int
    request: Request
    answer: Answer
    echo: str | None = None
    prompt_logprobs: Sequence[Score | None] = ()


@dataclass
class Job:
    """A request in work."""

    model: str
    choices: list[Choice]
    format: Format
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, stream: bool) -> dict[str, Any]:
        kind = self.format.chunk if stream else self.format.kind
        return {"id": f"{self.format.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of the answers."""
        prompts = {id(choice.request.ids): len(choice.request.ids) for choice in self.choices}
        before, new = sum(prompts.values()), sum(len(choice.answer.ids) for choice in self.choices)
        return {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new}


async def respond(served: Served, asked: Completion | Chat) -> Response:
    """Answer a request, at once or as a stream. Raises `ApiError`."""
    model = await served.find(asked.model)
    limits = served.limits
    form: Format
    if isinstance(asked, Chat):
        prompts = [await asyncio.to_thread(model.chat_ids, asked.messages)]
        form, most = ChatFormat(model.texts), asked.max_completion_tokens
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true; set it too.", param="top_logprobs")
    else:
        prompts = await asyncio.to_thread(model.prompt_ids, asked.prompt)
        form, most = CompletionFormat(model.texts), None
        logprobs = asked.logprobs
    most = asked.max_tokens if most is None else most
    _check(asked, limits, len(prompts), logprobs)
    echo = isinstance(asked, Completion) and asked.echo
    name, seed = secrets.token_hex(12), asked.first_seed()
    choices = []
    for number, ids in enumerate(prompts):
        room = model.room(ids, most, form.default_tokens, echo)
        for k in range(asked.n):
            index = number * asked.n + k
            request = Request(
                f"{name}-{index}",
                ids,
                model.adapter,
                _sampling(asked, room, seed),
                logprobs,
                prompt_logprobs=echo and (logprobs is not None or room == 0),
                stop=() if asked.ignore_eos else model.stop,
                row=k,  # other draws than those of the first answer
            )
            text = model.text_of(ids) if echo else None
            choices.append(Choice(index, request, Answer(model.tokenizer, ids, asked.stops), text))
    job = Job(asked.model, choices, form, name)
    stack = AsyncExitStack()
    queue = await stack.enter_async_context(served.engine.submitted([choice.request for choice in choices]))
    deadline = asyncio.get_running_loop().time() + limits.request_timeout_s
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return _Stream(_events(served, job, queue, deadline, usage), stack)
    async with stack:
        async for _ in _tokens(served, job, queue, deadline):
            pass
        return JSONResponse(_whole(job))


def _check(asked: Sampled, limits: Limits, prompts: int, logprobs: int | None) -> None:
    if prompts * asked.n > limits.max_choices:
        raise ApiError(400, f"{prompts} prompts with n={asked.n} exceed {limits.max_choices} answers; ask for fewer.")
    if logprobs is not None and logprobs > limits.max_logprobs:
        text = f"{logprobs} alternatives per token exceed the limit of {limits.max_logprobs}; ask for fewer."
        raise ApiError(400, text, param="logprobs")
    if any(not stop for stop in asked.stops):
        raise ApiError(400, "stop holds an empty text; leave it out.", param="stop")
    if len(asked.stops) > 16 or any(len(stop) > 1000 for stop in asked.stops):
        raise ApiError(400, "stop takes at most 16 texts of 1,000 characters; give fewer.", param="stop")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream=true; leave it out.", param="stream_options")


def _sampling(asked: Sampled, most: int, seed: int) -> Sampling:
    return Sampling.model_construct(  # checked already; 0 new tokens are allowed here
        max_new_tokens=most,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=max(asked.top_k, 0),
        seed=seed,
        stop_at_eos=not asked.ignore_eos,
    )


async def _tokens(served: Served, job: Job, queue: Tokens, deadline: float) -> AsyncIterator[Choice]:
    """Give each choice its tokens until all have ended; yields the choice of each token.

    Raises `ApiError` for a failed one, and when the time is over.
    """
    by_name = {choice.request.name: choice for choice in job.choices}
    alarm = asyncio.get_running_loop().call_at(deadline, queue.put_nowait, None)
    try:
        while any(choice.answer.finish is None for choice in job.choices):
            if (token := await queue.get()) is None:
                most = served.limits.request_timeout_s
                text = f"The answer was not complete within {most:g} s; ask for fewer tokens."
                raise ApiError(504, text, "timeout")
            choice = by_name[token.request]
            if token.finish in ("error", "cancelled"):
                raise ApiError(503, token.error or "The request was cancelled; try again.", "unavailable", retry_s=1)
            if token.prompt_logprobs is not None:
                choice.prompt_logprobs = token.prompt_logprobs
            choice.answer.add(token.id, token.finish, token.finish == "stop", token.logprob, token.top)
            if choice.answer.stopped:
                served.engine.cancel(token.request)
            yield choice
    finally:
        alarm.cancel()


def _whole(job: Job) -> dict[str, Any]:
    choices = []
    for choice in job.choices:
        text, scored = choice.answer.take()
        choices.append(job.format.whole(choice.index, *_parts(job, choice, text, scored), choice.answer.finish))
    return job.head(stream=False) | {"choices": choices, "usage": job.usage}


def _parts(job: Job, choice: Choice, text: str, scored: list[Scored], first: bool = True) -> tuple[str, Any]:
    """Return the text and log probabilities of a part of an answer; the first part begins with the echo."""
    echo = choice.echo if first else None
    whole = (echo or "") + text
    if choice.request.logprobs is None:
        return whole, None
    logprobs = job.format.logprobs(scored, len(choice.echo or ""))
    if echo is not None:
        logprobs = job.format.echoed(choice.request.ids, choice.prompt_logprobs, logprobs)
    return whole, logprobs


async def _events(served: Served, job: Job, queue: Tokens, deadline: float, usage: bool) -> AsyncIterator[str]:
    """Yield the events of a stream. An error after its start is an event, too, and ends it."""
    head = job.head(stream=True)
    alike = json.dumps(head | ({"usage": None} if usage else {}), ensure_ascii=False).removesuffix("}")

    def event(choices: list[dict[str, Any]]) -> str:
        return f'data: {alike}, "choices": {json.dumps(choices, ensure_ascii=False)}}}\n\n'

    if opening := [part for choice in job.choices if (part := job.format.opening(choice.index))]:
        yield event(opening)
    begun: set[int] = set()
    try:
        async for choice in _tokens(served, job, queue, deadline):
            text, scored = choice.answer.take()
            first, finish = choice.index not in begun, choice.answer.finish
            if text or scored or finish or (first and choice.echo):
                begun.add(choice.index)
                yield event([job.format.part(choice.index, *_parts(job, choice, text, scored, first), finish)])
    except Exception as error:
        if not isinstance(error, ApiError):
            log.error(f"a stream failed: {place_of(error)}")
        body = error.body if isinstance(error, ApiError) else ApiError(500, FAILED).body
        yield f"data: {json.dumps(body)}\n\n"
        return
    if usage:
        yield f"data: {json.dumps(head | {'choices': [], 'usage': job.usage}, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """A stream that releases what it holds however it ends, even before it starts."""

    def __init__(self, events: AsyncIterator[str], stack: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self.stack:
            await super().__call__(scope, receive, send)
