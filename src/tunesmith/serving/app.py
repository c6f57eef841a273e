"""The routes: who may ask, what is read, what is called. Nothing else."""

import asyncio
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tunesmith.serving import protocol as wire
from tunesmith.serving.faults import Refusal, is_stopping, too_many
from tunesmith.serving.metrics import CONTENT_TYPE
from tunesmith.serving.model_cards import CardedModel, carded_model
from tunesmith.serving.outer_errors import StopAnswer
from tunesmith.serving.page_routes import add_page
from tunesmith.serving.request_log import HEADER, RequestLog, current_record
from tunesmith.serving.service import Service
from tunesmith.serving.streaming import HungUp

_SOON_READ = 2**16  # bytes; reading a longer body would hold up the streams
_ALIVE = "/health"
BODY_SECONDS = 60.0  # for the whole body, so that slow senders cannot hold connections


async def body_of(request: Request) -> bytes:
    """The request's body, read no further than it may be long.

    Raises:
        Refusal: 415: it is not said to be JSON; 413: it is longer; 408: it does not come.
    """
    # A page of another site can make a browser send a form or a text, but not JSON.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "The body must be JSON, with Content-Type: application/json"
        raise Refusal(415, message, "not_json", headers={"Connection": "close"})
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > wire.MAX_BODY_BYTES:
                    message = f"The body is longer than {wire.MAX_BODY_BYTES:,} bytes"
                    raise Refusal(413, message, "body_too_long", headers={"Connection": "close"})
    except TimeoutError:
        message = f"The body did not come within {BODY_SECONDS:g} s"
        raise Refusal(408, message, "body_too_slow", headers={"Connection": "close"}) from None
    return bytes(body)


Body = Annotated[bytes, Depends(body_of)]


def create_app(service: Service) -> FastAPI:
    """The application; the service's engine is the caller's to close."""

    async def may_come(request: Request) -> None:
        if request.scope["path"] == _ALIVE:  # whoever looks after the server asks by any name, in any crowd
            return
        if service.is_crowded():
            raise too_many()
        service.hosts.check(request.method, request.headers)

    # Documentation pages of FastAPI load scripts from elsewhere.
    app = FastAPI(
        title="tunesmith", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(may_come)]
    )

    async def may_ask(request: Request) -> None:
        service.keys.check(request.headers.get("authorization"))

    async def may_load(request: Request) -> None:
        service.keys.check_admin(request.headers.get("authorization"))

    asks, loads = [Depends(may_ask)], [Depends(may_load)]

    @app.post("/v1/chat/completions", dependencies=asks)
    async def chat_completions(request: Request, body: Body) -> Response:
        return await service.answer(await _parsed(service, wire.ChatRequest, body), request.receive)

    @app.post("/v1/completions", dependencies=asks)
    async def completions(request: Request, body: Body) -> Response:
        return await service.answer(await _parsed(service, wire.CompletionRequest, body), request.receive)

    @app.get("/v1/models", dependencies=asks)
    async def models() -> wire.ModelList:
        return await service.threads.run("look", service.models)

    @app.get("/v1/models/{name:path}", dependencies=asks)
    async def model(name: str) -> CardedModel:
        return await service.threads.run("look", carded_model, service, name)

    @app.post("/v1/load_lora_adapter", dependencies=loads)
    async def load_lora_adapter(body: Body) -> dict[str, Any]:
        given = wire.parse_request(wire.LoadRequest, body)
        version = await service.threads.run("load", service.registry.load, given.lora_name, given.lora_path)
        return {"id": version.name, "object": "model", "parent": version.parent, "version": version.key}

    @app.post("/v1/unload_lora_adapter", dependencies=loads)
    async def unload_lora_adapter(body: Body) -> dict[str, Any]:
        given = wire.parse_request(wire.UnloadRequest, body)
        await service.threads.run("look", service.registry.unload, given.lora_name)
        return {"id": given.lora_name, "object": "model", "deleted": True}

    @app.get(_ALIVE)
    async def health() -> dict[str, str]:
        if service.is_stopping:
            raise is_stopping()
        return {"status": "ok"}

    @app.get("/metrics", dependencies=asks)
    async def metrics() -> Response:
        # Elsewhere, as other processes may be asked; the counts are the event loop's own.
        facts = await service.threads.run("look", service.memory.facts)
        return PlainTextResponse(service.metrics_text(facts), media_type=CONTENT_TYPE)

    add_page(app)
    _answer_errors(app, service)
    app.add_middleware(StopAnswer)
    app.add_middleware(RequestLog)
    return app


async def _parsed(service: Service, kind: type[wire.RequestType], body: bytes) -> wire.RequestType:
    is_short = len(body) <= _SOON_READ
    request = (
        wire.parse_request(kind, body)
        if is_short
        else await service.threads.run("text", wire.parse_request, kind, body)
    )
    current_record().model = getattr(request, "model", None)
    return request


def _answer_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        service.metrics.refused[refusal.status] += 1
        current_record().error = refusal.code
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]  # of request.url Host is a part, which may be anything
        message = f"{request.method} {path[:256]}: {error.detail}"
        return await refused(
            request, Refusal(error.status_code, message, "no_such_route", headers=error.headers)
        )

    @app.exception_handler(HungUp)
    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nginx's number; nobody reads it

    @app.exception_handler(Exception)
    async def broken(request: Request, _: Exception) -> Response:
        # Starlette logs the traceback; the client is told nothing of it.
        # This answer is outside of the log of requests.
        headers = {HEADER: request.scope.get("tunesmith.request_id", "")}
        fault = Refusal(500, "A fault in the server; its log says more", "internal_error", headers=headers)
        return await refused(request, fault)
