"""One line of JSON for each request: who answered, how much, how fast, how it ended.

Prompts and answers are in it only where the operator asks for them; headers, keys and query strings never are. The
id of a request goes back to the client as ``x-request-id``; a client's own is taken over if it is a plain word.
"""

import json
import logging
import re
import secrets
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_LOG = logging.getLogger("tunesmith.requests")
_SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z")
_QUIET = ("/health", "/metrics")  # asked for every few seconds by machines


@dataclass
class RequestRecord:
    """What is known of one request so far; whoever learns more writes it in."""

    id: str
    began: float = field(default_factory=time.monotonic)
    model: str | None = None
    version: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    first_token_at: float | None = None
    finish: list[str] = field(default_factory=list)
    error: str | None = None
    prompts: list[str] | None = None  # None: contents are not wanted
    answers: list[str] | None = None

    def fields(self, route: str, status: int) -> dict[str, Any]:
        """The line, with what does not apply left out."""
        first = self.first_token_at
        finish = self.finish[0] if len(self.finish) == 1 else self.finish or None
        found = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": self.id,
            "route": route[:256],
            "status": status,
            "model": self.model,
            "version": self.version,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "first_token_seconds": None if first is None else round(first - self.began, 4),
            "seconds": round(time.monotonic() - self.began, 4),
            "finish_reason": finish,
            "error": self.error,
            "prompts": self.prompts,
            "answers": self.answers,
        }
        return {name: value for name, value in found.items() if value is not None}


_CURRENT: ContextVar[RequestRecord | None] = ContextVar("tunesmith_request", default=None)


def current_record() -> RequestRecord:
    """The record of the request at work; one that nobody reads where there is none."""
    return _CURRENT.get() or RequestRecord("")


def start_request_log(*, contents: bool = False, stream: TextIO | None = None) -> None:
    """Write a line for each request from now on; calling it again replaces what was said before.

    Args:
        contents: whether prompts and answers are in it.
        stream: where to; None: standard error.
    """
    stop_request_log()
    handler = _LinesHandler(stream or sys.stderr, contents)
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False


def stop_request_log() -> None:
    """Write no more lines."""
    for handler in [handler for handler in _LOG.handlers if isinstance(handler, _LinesHandler)]:
        _LOG.removeHandler(handler)
    _LOG.setLevel(logging.NOTSET)
    _LOG.propagate = True


class _LinesHandler(logging.StreamHandler[TextIO]):
    def __init__(self, stream: TextIO, contents: bool) -> None:
        super().__init__(stream)
        self.contents = contents
        self.setFormatter(logging.Formatter("%(message)s"))


class RequestLog:
    """ASGI middleware: gives each request its id and its record, and logs it when its answer has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_id_of(scope))
        if any(isinstance(handler, _LinesHandler) and handler.contents for handler in _LOG.handlers):
            record.prompts, record.answers = [], []
        scope["tunesmith.request_id"] = record.id
        status = 500  # where the answer never begins, Starlette says so

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = record.id
            await send(message)

        token = _CURRENT.set(record)
        try:
            await self._app(scope, receive, marked)
        finally:
            _CURRENT.reset(token)
            if not (scope["path"] in _QUIET and status < 400):
                _LOG.info(
                    "%s", json.dumps(record.fields(scope["path"], status), ensure_ascii=False, default=str)
                )


def _id_of(scope: Scope) -> str:
    given = Headers(scope=scope).get(HEADER, "")
    return given if _SANE.match(given) else f"req-{secrets.token_hex(12)}"
