"""What every request passes first: the token, the size of its body, the time in which it must arrive, the counts.

Pure ASGI, so that a client that leaves cancels its request both under Ray Serve and under a plain server.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finhpc.serving.metrics import Metrics
from finhpc.serving.protocol import ApiError
from finhpc.settings.serve import Limits

log = logging.getLogger(__name__)

OPEN = ("/health", "/ready")  # without a token
CLOSED = 499  # the client left; nginx's code


class ClientGone(Exception):
    """The client has left."""


class Guard:
    """`token_sha256`: hex digest of the token; `paths`: the app's, others are counted as one."""

    def __init__(self, app: ASGIApp, token_sha256: str, limits: Limits, metrics: Metrics, paths: set[str]) -> None:
        self.app, self.token_sha256, self.limits, self.metrics, self.paths = app, token_sha256, limits, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the app's start and end; a websocket is refused by having no route
            await self.app(scope, receive, send)
            return
        status = CLOSED

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"] if scope["path"] in self.paths else "other"
        with self.metrics.in_flight.track_inprogress():
            try:
                await self._checked(scope, receive, counted)
            except ClientGone:
                status = CLOSED
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, counted)
            except Exception as error:  # answered as 500 already
                log.error(f"a request to {path} failed: {place_of(error)}")
            finally:
                self.metrics.requests.labels(path=path, code=status).inc()

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN and not self._allowed(headers.get(b"authorization", b"")):
            raise ApiError(401, "The token is missing or wrong; send Authorization: Bearer TOKEN.", "invalid_api_key")
        body = await self._body(headers, receive)
        await _until_gone(self.app, scope, body, receive, send)

    def _allowed(self, header: bytes) -> bool:
        kind, _, token = header.partition(b" ")
        digest = hashlib.sha256(token.strip()).hexdigest()
        return hmac.compare_digest(digest, self.token_sha256) and kind.lower() == b"bearer"

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Read the whole body, within the limits of size and time."""
        most = self.limits.max_body_bytes
        too_large = ApiError(413, f"The body is larger than {most:,} bytes; send less.", "body_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            limit = self.limits.body_timeout_s
            raise ApiError(408, f"The body did not arrive within {limit:g} s; send it again.", "timeout") from None


async def _until_gone(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Run the app on a body that was read, and cancel it when the client leaves. Raises `ClientGone` then."""
    gone = asyncio.Event()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    work, watching = asyncio.ensure_future(app(scope, replay, send)), asyncio.ensure_future(watch())
    try:
        await asyncio.wait((work, watching), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        await work
    finally:
        for task in (work, watching):
            task.cancel()
        await asyncio.gather(work, watching, return_exceptions=True)


def place_of(error: BaseException) -> str:
    """Return an error's kind and where it was raised, without its message, which may hold a part of a prompt."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" in {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return f"{type(error).__name__}{where}"
