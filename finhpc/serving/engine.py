"""The batcher in a thread of its own, between requests that wait in an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import torch
from prometheus_client import Histogram

from finhpc.errors import ConfigError
from finhpc.generation.batching import Batcher
from finhpc.generation.requests import Request, Token
from finhpc.serving.protocol import ApiError
from finhpc.settings.serve import Limits

log = logging.getLogger(__name__)

IDLE_S = 0.5
RETRY_S = 1  # for a client that was refused because the queue is full
Tokens = asyncio.Queue[Token | None]  # None: the time is over
BROKEN = "The model stopped working; the server starts it again."


class Engine:
    """Runs a batcher. `first`, `between`: the times to the first token and between two tokens.

    `threads`: torch's in a pass. Only the batcher's thread should have so many: those of GNU's OpenMP hardly wait for
    each other before they sleep, and take 50 us to wake up, if all threads that they were made for need more cores than
    there are.
    """

    def __init__(self, batcher: Batcher, limits: Limits, first: Histogram, between: Histogram, threads: int) -> None:
        self.batcher, self.limits, self.first, self.between = batcher, limits, first, between
        self.threads = threads
        self.failure: str | None = None  # what ended the thread
        self._queues: dict[str, Tokens] = {}
        self._times: dict[str, tuple[float, bool]] = {}  # of the newest token, or the start; whether one has come
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; its tokens go to the event loop that runs now."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="finhpc-batcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after its pass."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def in_work(self) -> int:
        """Requests in the batch or waiting for it."""
        return len(self._queues)

    @asynccontextmanager
    async def submitted(self, requests: Sequence[Request]) -> AsyncIterator[Tokens]:
        """Add requests and yield the queue of their tokens; whatever is unfinished at the end is cancelled.

        Raises `ApiError` if too many wait or one does not fit.
        """
        if self.failure is not None:
            raise ApiError(503, BROKEN, "unavailable", retry_s=RETRY_S)
        room = self.limits.max_running + self.limits.max_queue
        if len(self._queues) + len(requests) > room:
            text = f"The server's queue of {self.limits.max_queue} requests is full; try again later."
            raise ApiError(429, text, "queue_full", retry_s=RETRY_S)
        queue: Tokens = asyncio.Queue()
        try:
            for request in requests:
                self._queues[request.name], self._times[request.name] = queue, (time.monotonic(), False)
                try:
                    self.batcher.add(request)
                except ConfigError as error:
                    self._forget(request.name)
                    raise ApiError(400, str(error), "does_not_fit") from None
            yield queue
        finally:
            for request in requests:
                self.cancel(request.name)

    def cancel(self, name: str) -> None:
        """End a request unless it has ended."""
        if self._forget(name):
            self.batcher.cancel(name)

    def _forget(self, name: str) -> bool:
        self._times.pop(name, None)
        return self._queues.pop(name, None) is not None

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        torch.set_num_threads(self.threads)
        try:
            while not self._closing.is_set():
                if self.batcher.wait(IDLE_S) and (tokens := self.batcher.step()):
                    loop.call_soon_threadsafe(self._deliver, tokens)
        except Exception as error:
            if not self._closing.is_set():
                log.exception("the model stopped working")
                loop.call_soon_threadsafe(self._fail, f"{type(error).__name__}: {error}")

    def _deliver(self, tokens: list[Token]) -> None:
        now = time.monotonic()
        for token in tokens:
            name = token.request
            if (queue := self._queues.get(name)) is None:
                continue
            if token.id is not None:
                before, follows = self._times[name]
                (self.between if follows else self.first).observe(now - before)
                self._times[name] = now, True
            if token.finish is not None:
                self._forget(name)
            queue.put_nowait(token)

    def _fail(self, failure: str) -> None:
        self.failure = failure
        for name, queue in list(self._queues.items()):
            self._forget(name)
            queue.put_nowait(Token(name, None, finish="error", error=BROKEN))
