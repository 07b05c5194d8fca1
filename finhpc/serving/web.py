"""The app: OpenAI's paths, adapters, health and metrics, behind the guard."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from finhpc.serving.completions import respond
from finhpc.serving.guard import Guard, place_of
from finhpc.serving.metrics import Metrics
from finhpc.serving.protocol import FAILED, ApiError, Chat, Completion, LoadAdapter, UnloadAdapter, parse
from finhpc.serving.served import Model, Served

log = logging.getLogger(__name__)

PUBLISH_S = 1.0
RETRY_S = 5  # for a client of a server that ends
BACKLOG = 2048  # connections that wait to be accepted
START_POLL_S = 0.01
END_S = 5  # for connections that are still open when it ends
CALLS = "/v1/"  # what is refused while the server drains


def make_app(served: Served, metrics: Metrics, token_sha256: str, address: tuple[str, int] | None = None) -> Any:
    """Return the ASGI app of a replica. `token_sha256`: hex digest of the token that clients must give.

    `address`: host and port that it listens on itself while it runs, besides what calls it.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        publishing = asyncio.create_task(_publish(served, metrics))
        async with AsyncExitStack() as stack:
            if address is not None:
                await stack.enter_async_context(_listening(guard, *address))
            yield
        publishing.cancel()
        with suppress(asyncio.CancelledError):
            await publishing
        await asyncio.to_thread(served.engine.close)

    app = FastAPI(title="finhpc", openapi_url=None, lifespan=life)
    _add_calls(app, served)
    _add_probes(app, served, metrics)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path[:100]} is not a call of this server; see /v1/models."
        return JSONResponse(ApiError(error.status_code, text).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return JSONResponse(ApiError(500, FAILED).body, 500)

    paths = {str(route.path) for route in app.routes if hasattr(route, "path")}
    guard = Guard(app, token_sha256, served.limits, metrics, paths)
    return guard


def _add_calls(app: FastAPI, served: Served) -> None:
    """Add what needs the token and is refused while the server drains."""
    created = int(time.time())

    def accepting() -> None:
        if served.shared.draining:
            raise ApiError(
                503, "The server is ending; call another one, or try again later.", "draining", None, RETRY_S
            )

    def described(model: Model) -> dict[str, Any]:
        own = {"id": model.id, "object": "model", "created": created, "owned_by": "finhpc"}
        return own | {"parent": None if model.adapter is None else served.base, "max_model_len": model.context}

    @app.get("/v1/models")
    async def models() -> Response:
        await served.follow()
        return JSONResponse({"object": "list", "data": list(map(described, served.models.values()))})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(described(await served.find(name)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        accepting()
        return await respond(served, parse(Completion, await request.body()))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        accepting()
        return await respond(served, parse(Chat, await request.body()))

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> Response:
        accepting()
        asked = parse(LoadAdapter, await request.body())
        await served.load(asked.lora_name, asked.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> Response:
        accepting()
        asked = parse(UnloadAdapter, await request.body())
        await served.unload(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def _add_probes(app: FastAPI, served: Served, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        broken = served.engine.failure is not None
        return PlainTextResponse("broken" if broken else "alive", 503 if broken else 200)

    @app.get("/ready")
    async def ready() -> Response:
        state = "broken" if served.engine.failure else "draining" if served.shared.draining else "ready"
        return PlainTextResponse(state, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def everything() -> Response:
        return Response(await asyncio.to_thread(metrics.everything), media_type=CONTENT_TYPE_LATEST)


async def _publish(served: Served, metrics: Metrics) -> None:
    """Write metrics and follow the list of adapters once a second; more often while draining, which waits for both."""
    while True:
        try:
            await asyncio.to_thread(metrics.publish)
            await served.follow()
        except Exception as error:  # such as a full disk, which may pass
            log.warning(f"the replica cannot use {served.shared.folder}: {place_of(error)}")
        await asyncio.sleep(PUBLISH_S / 10 if served.shared.draining else PUBLISH_S)


@asynccontextmanager
async def _listening(app: ASGIApp, host: str, port: int) -> AsyncIterator[None]:
    """Answer requests to host:port in this event loop, by an app whose lifespan runs already.

    A streamed token that goes through Ray Serve's proxy takes 1.5 ms of processor time more, as much as a small model
    needs to compute it. Raises `OSError` if the port is in use.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind((host, port))
        how = {"log_config": None, "access_log": False, "server_header": False, "timeout_graceful_shutdown": END_S}
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", backlog=BACKLOG, **how))  # type: ignore[arg-type]
        answering = asyncio.create_task(server.serve(sockets=[own]))
        while not (server.started or answering.done()):
            await asyncio.sleep(START_POLL_S)
        try:
            yield
        finally:
            server.should_exit = True
            await answering
