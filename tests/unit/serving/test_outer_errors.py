"""Errors that no route answers have the form of all others: bytes that are no HTTP, a crowd, the end of the server."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving_parts import PlainEngine, Served, served, wait_for

LONG = {"model": "tiny", "prompt": "red", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


def connected(server: Served) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def everything(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(2**16):
        found += part
    return found


def error_of(answer: bytes) -> tuple[str, dict[str, Any]]:
    """The status line, and the error in OpenAI's form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    assert "content-type: application/json" in [line.lower() for line in headers]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70_000],
    ids=["tls", "words", "no host", "two hosts", "long head"],
)  # fmt: skip
def test_bytes_that_are_no_http(server: Served, sent: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(sent)
        status, error = error_of(everything(connection))
    assert status == "HTTP/1.1 400 Bad Request"
    assert (error["code"], error["type"]) == ("invalid_http", "invalid_request_error")


def test_a_body_that_breaks_off_amid_its_pieces(server: Served) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connected(server) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\nnothing of the kind\r\n")
        status, error = error_of(everything(connection))
    assert (status, error["code"]) == ("HTTP/1.1 400 Bad Request", "invalid_http")


def test_what_comes_amid_an_answer_closes_the_connection(server: Served) -> None:
    body = json.dumps({**LONG, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with connected(server) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.sendall(b"\x00 no request\r\n\r\n")
        everything(connection)
    wait_for(lambda: server.engine.facts().running == 0)
    assert server.client().get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/v1/completions/x"])
def test_methods_that_no_route_has(server: Served, path: str) -> None:
    for method in ("OPTIONS", "DELETE", "PATCH"):
        reply = server.client().request(method, path)
        assert reply.status_code in (404, 405)
        assert reply.json()["error"]["code"] == "no_such_route"


@pytest.fixture
def small(base_folder: Path, tmp_path: Path) -> Iterator[Served]:
    with served(base_folder, tmp_path) as running:
        running.server._most_connections = 4
        yield running


def test_more_connections_than_are_answered_are_told_so(small: Served) -> None:
    with ExitStack() as idle:
        for _ in range(3):
            idle.enter_context(connected(small))
        wait_for(lambda: len(small.server.server_state.connections) == 3)
        for path in ("/v1/models", "/", "/metrics"):
            reply = small.client().get(path)
            assert (reply.status_code, reply.headers["connection"]) == (503, "close")
            assert int(reply.headers["retry-after"]) >= 1
            error = reply.json()["error"]
            assert (error["code"], error["type"]) == ("too_many_connections", "server_error")
            assert reply.headers["x-request-id"]
        with small.client() as http:
            assert http.get("/health").json() == {"status": "ok"}  # alive it is
    wait_for(lambda: not small.server.server_state.connections)
    samples = small.client().get("/metrics").text
    assert 'tunesmith:http_errors_total{status="503"} 3' in samples


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_that_the_end_of_the_server_overtakes(
    base_folder: Path, tmp_path: Path, is_stream: bool
) -> None:
    engine = PlainEngine()
    with served(base_folder, tmp_path, engine, grace_seconds=1) as server, ThreadPoolExecutor(2) as pool:
        engine.gate.clear()

        def ask(stream: bool) -> httpx.Response:
            return server.client().post("/v1/completions", json={**LONG, "stream": stream})

        asked = [pool.submit(ask, is_stream), pool.submit(ask, is_stream)]
        wait_for(lambda: engine.facts().running == 2)
        server.server.stop()
        for one in asked:
            reply = one.result(10)
            if not is_stream:
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "stopping")
                assert int(reply.headers["retry-after"]) >= 1
                continue
            assert reply.status_code == 200
            *_, error, done = [line for line in reply.text.splitlines() if line]
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "stopping"
            assert done == "data: [DONE]"
        server.thread.join(5)
        assert not server.thread.is_alive()
        assert engine.facts().running == 0


def test_a_fault_of_the_server_tells_nothing_of_itself(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret place")

    monkeypatch.setattr(server.service.registry, "listed", broken)
    reply = server.client().get("/v1/models")
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in reply.text
