"""What Ray Serve raises where a replica is gone: never the end of a request that another replica could go on with.

Ray itself does not run here; its handle is one that fails as Ray's does.
"""

import asyncio
import importlib.util
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.serving.remote_engine import Call, Lost
from tunesmith.serving.seam import EngineError, Sampling, Token

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
CALL = Call((1, 2), Sampling(4, seed=1), None, None)
TOKEN = Token(5, None, (), None)


class Response:
    """Of a call that fails: ``cancel`` raises what the call did, as Ray Serve 2.60's does."""

    def __init__(self, error: BaseException, after: int) -> None:
        self._error, self._after = error, after
        self.cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1
        if isinstance(self._error, Exception):
            raise self._error

    async def __aiter__(self) -> AsyncGenerator[tuple[Token, ...], None]:
        for _ in range(self._after):
            yield (TOKEN,)
        raise self._error

    def __await__(self) -> Any:
        if self._error:
            raise self._error
        yield


class Handle:
    def __init__(self, response: Response | None = None) -> None:
        self.response = response

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, *_: Any) -> Response:
        if self.response is None:
            raise RuntimeError("Ray Serve is not started")
        return self.response


def errors() -> dict[str, Callable[[], BaseException]]:
    from ray import exceptions
    from ray.serve.exceptions import ReplicaUnavailableError, RequestCancelledError

    return {
        "died": exceptions.ActorDiedError,
        "unavailable": lambda: exceptions.ActorUnavailableError("for now", None),
        "crashed": exceptions.WorkerCrashedError,
        "raylet": exceptions.LocalRayletDiedError,
        "system": lambda: exceptions.RaySystemError("a part of Ray is gone"),
        "rpc": lambda: exceptions.RpcError("connection refused"),
        "stream": exceptions.ObjectRefStreamEndOfStreamError,
        "upstream": lambda: exceptions.RayTaskError("answer", "", exceptions.ActorDiedError()),
        "not accepted": lambda: RuntimeError("Unexpected error (StatusCode.UNAVAILABLE): Socket closed."),
        "replica": lambda: ReplicaUnavailableError("x"),
        "request": RequestCancelledError,
        "cancelled by Ray": asyncio.CancelledError,
    }


NAMES = ("died", "unavailable", "crashed", "raylet", "system", "rpc", "stream", "upstream", "not accepted", "replica",
         "request", "cancelled by Ray")  # fmt: skip


def asked(handle: Handle, folder: Path) -> tuple[list[tuple[Token, ...]], BaseException | None]:
    """What comes of a call, and what ends it."""
    from tunesmith.serving.ray_app import Deployed

    async def ask() -> tuple[list[tuple[Token, ...]], BaseException | None]:
        got: list[tuple[Token, ...]] = []
        try:
            async for items in Deployed(handle, "x", folder).answers(CALL):
                assert not isinstance(items, EngineError)
                got.append(items)
        except BaseException as error:
            return got, error
        return got, None

    return asyncio.run(ask())


def test_every_kind_is_in_the_list() -> None:
    assert set(errors()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [0, 3])
def test_whatever_a_lost_replica_raises_is_a_loss(name: str, after: int, tmp_path: Path) -> None:
    response = Response(errors()[name](), after)
    got, error = asked(Handle(response), tmp_path)
    assert got == [(TOKEN,)] * after
    assert isinstance(error, Lost), repr(error)
    assert response.cancelled == 1


def test_a_call_that_cannot_even_be_made_is_a_loss(tmp_path: Path) -> None:
    assert isinstance(asked(Handle(), tmp_path)[1], Lost)


def test_a_fault_of_our_code_there_is_none(tmp_path: Path) -> None:
    from ray.exceptions import RayTaskError
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import DeploymentUnavailableError

    fault = RayTaskError("answer", "Traceback", ZeroDivisionError("x")).as_instanceof_cause()
    error = asked(Handle(Response(fault, 1)), tmp_path)[1]
    assert isinstance(error, EngineError)
    assert str(error) == "the replica failed (ZeroDivisionError)"
    error = asked(Handle(Response(DeploymentUnavailableError(DeploymentID("x")), 0)), tmp_path)[1]
    assert str(error) == "no process could be started"


def test_reading_an_adapter_is_lost_likewise(tmp_path: Path) -> None:
    from tunesmith.serving.ray_app import Deployed

    for name in NAMES:
        handle = Handle(Response(errors()[name](), 0))
        with pytest.raises(Lost):
            asyncio.run(Deployed(handle, "x", tmp_path).read("one"))


def test_whoever_asked_may_still_cancel(tmp_path: Path) -> None:
    from tunesmith.serving.ray_app import Deployed

    class Slow(Response):
        async def __aiter__(self) -> AsyncGenerator[tuple[Token, ...], None]:
            await asyncio.sleep(60)
            yield ()

    async def work() -> None:
        task = asyncio.ensure_future(
            anext(aiter(Deployed(Handle(Slow(RuntimeError(), 0)), "x", tmp_path).answers(CALL)))
        )
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
