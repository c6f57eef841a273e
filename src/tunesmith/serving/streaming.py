"""Answers that come in pieces, as server-sent events, and work that ends when the client hangs up.

The form of events is https://html.spec.whatwg.org/multipage/server-sent-events.html, with OpenAI's ``[DONE]``.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tunesmith.serving.faults import Refusal, is_stopping
from tunesmith.serving.request_log import current_record

_DONE = b"data: [DONE]\n\n"
_SECONDS_TO_SAY = 1.0  # that the server ends, to a client that may read no further
Result = TypeVar("Result")


class HungUp(Exception):
    """The client closed the connection before it had its answer."""


async def until_hang_up(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled once the client closes the connection.

    Args:
        receive: of the request, whose body has been read.
        work: to be done.

    Raises:
        HungUp: the client is gone.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HungUp
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends each reply as an event. An error after the first one is an event too, as the status is sent by then.

    Args:
        replies: what is sent.
        close: called when the stream has ended, in whatever way, even before it began.
        headers: of the answer.
        seconds: that all of it may take; who reads no further by then is as good as gone.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        replies: AsyncIterator[BaseModel],
        close: Callable[[], None],
        headers: dict[str, str],
        seconds: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._replies, self._close, self._seconds = replies, close, seconds
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, until it ends or the client hangs up."""
        try:
            with suppress(HungUp, TimeoutError):  # nobody is left to tell
                async with asyncio.timeout(self._seconds):
                    await until_hang_up(receive, self._send_all(_to_client(send)))
        except asyncio.CancelledError:  # by the server, which ends
            if self._has_begun:
                with suppress(HungUp, TimeoutError):
                    async with asyncio.timeout(_SECONDS_TO_SAY):
                        await self._end(_to_client(send), is_stopping())
            raise
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._has_begun = True
        fault = None
        try:
            async for reply in self._replies:
                await _body(send, event(reply.model_dump_json()))
        except Refusal as refusal:
            fault = refusal
        await self._end(send, fault)

    async def _end(self, send: Send, fault: Refusal | None) -> None:
        if fault is not None:
            current_record().error = fault.code
            await _body(send, event(json.dumps(fault.body())))
        await _body(send, _DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: str) -> bytes:
    """One event; ``data`` is JSON, which has no line breaks."""
    return f"data: {data}\n\n".encode()


def _to_client(send: Send) -> Send:
    """``send``, whose OSError (what servers raise when the client is gone) is told apart from faults of our own."""

    async def checked(message: Message) -> None:
        try:
            await send(message)
        except OSError as error:
            raise HungUp from error

    return checked


async def _body(send: Send, content: bytes) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": True})
