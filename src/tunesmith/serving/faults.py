"""Errors of the HTTP interface, in the form in which OpenAI's clients expect them."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

RETRY_SECONDS = 1  # an answer's slot is free again within seconds


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do, without secrets and without paths of this machine.
        code: a word for programs.
        param: the field of the request at fault.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole HTTP answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """400: the request itself has to be changed."""
    return Refusal(400, message, code, param)


def unknown_model(name: str) -> Refusal:
    """404: no model of this name; the base never answers in its place."""
    return Refusal(404, f"The model `{name[:256]}` does not exist", "model_not_found", "model")


def unloadable_model(name: str) -> Refusal:
    """404: files of this name are there, but they are no adapter of this base."""
    message = f"The model `{name[:256]}` cannot be loaded; the server's log says why"
    return Refusal(404, message, "model_not_loadable", "model")


def queue_is_full() -> Refusal:
    """429: as many requests as may are running and waiting."""
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return Refusal(429, "The queue is full; try again", "queue_full", headers=headers)


def too_late(seconds: float) -> Refusal:
    """504: the request's time is over."""
    return Refusal(504, f"The answer took longer than {seconds:g} s; ask for fewer tokens", "deadline")


def is_stopping() -> Refusal:
    """503: the server finishes what runs and takes nothing more."""
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return Refusal(503, "The server is stopping; try again", "stopping", headers=headers)


def too_many() -> Refusal:
    """503: more connections are open than requests that could run and wait; this one is closed."""
    headers = {"Retry-After": str(RETRY_SECONDS), "Connection": "close"}
    return Refusal(503, "Too many connections are open; try again", "too_many_connections", headers=headers)
