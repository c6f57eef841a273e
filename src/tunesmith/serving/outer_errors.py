"""Errors that no route can answer, in the form of all others; uvicorn by itself would say them in plain text."""

import asyncio

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tunesmith.serving.faults import Refusal, is_stopping

_SECONDS_TO_SAY = 1.0  # to a client that may read no further


class HttpProtocol(H11Protocol):
    """uvicorn's reading of HTTP, but for what it answers to bytes that are none."""

    def send_400_response(self, msg: str) -> None:
        """Answer and close the connection; uvicorn calls this."""
        message = "The request is not HTTP/1.1, or its head is too long"
        response = Refusal(400, message, "invalid_http", headers={"Connection": "close"}).response()
        head = h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request")
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is under way
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class StopAnswer:
    """ASGI middleware: says so where the server ends before the answer has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:  # uvicorn's, at the end of the grace time
            if has_begun or scope["type"] != "http":
                raise
            async with asyncio.timeout(_SECONDS_TO_SAY):
                await is_stopping().response()(scope, receive, send)
