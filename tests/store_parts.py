"""A real S3 server on loopback, and a line to it that can be broken at will."""

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.errors import OutputError
from tunesmith.storage.places import open_place, upload

BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Line:
    """A TCP proxy. ``cuts``: how many more connections break; ``busy``: how many are turned away with 503.

    Attributes:
        after: bytes that pass, in the direction ``way``, before a connection breaks.
        way: "down": what the server sends; "up": what the client sends.
        seen: how many connections came.
    """

    target: tuple[str, int]
    cuts: int = 0
    after: int = 0
    way: str = "down"
    busy: int = 0
    is_down: bool = False
    seen: int = 0
    port: int = 0
    _open: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self, times: int, after: int, way: str = "down") -> None:
        """Break each of the next ``times`` connections after so many bytes."""
        self.cuts, self.after, self.way = times, after, way
        self.hang_up()

    def turn_away(self, times: int) -> None:
        self.busy = times
        self.hang_up()

    def hang_up(self) -> None:
        """Close what is open: the next request needs a new connection."""
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def heal(self) -> None:
        self.cuts = self.busy = 0
        self.is_down = False

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        self.seen += 1
        if self.is_down:
            client.close()
            return
        if self.busy > 0:
            self.busy -= 1
            client.recv(2**16)
            client.sendall(BUSY % (len(SLOW_DOWN), SLOW_DOWN))
            client.close()
            return
        limit = {"up": None, "down": None}
        if self.cuts > 0:
            self.cuts -= 1
            limit[self.way] = self.after
        server = socket.create_connection(self.target)
        self._open += [client, server]
        ends = (client, server)
        up = threading.Thread(target=self._pump, args=(client, server, limit["up"], ends), daemon=True)
        up.start()
        self._pump(server, client, limit["down"], ends)
        up.join(5)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, limit: int | None, ends) -> None:
        left = limit
        with suppress(OSError):
            while data := source.recv(2**16):
                if left is not None:
                    target.sendall(data[:left])
                    left -= len(data)
                    if left <= 0:
                        break
                    continue
                target.sendall(data)
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def line_to(host: str, port: int) -> Iterator[Line]:
    listener = socket.create_server(("127.0.0.1", 0))
    line = Line((host, port), port=listener.getsockname()[1])
    threading.Thread(target=line.serve, args=(listener,), daemon=True).start()
    try:
        yield line
    finally:
        listener.close()
        line.hang_up()


def environment(url: str) -> dict[str, str]:
    """Where S3 is and who asks, for this test and for no store of the user."""
    return {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": "testing-id",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def fresh_clients() -> Iterator[None]:
    """fsspec keeps its clients, which have read the environment when they were made."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        S3FileSystem.clear_instance_cache()


@contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """moto's server: the whole protocol over HTTP, in this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()
    finally:
        server.stop()


@contextmanager
def google_server() -> Iterator[tuple[str, int]]:
    """An emulator of Google Cloud Storage, in this process and in memory."""
    from gcp_storage_emulator.server import create_server

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    try:
        yield "127.0.0.1", port
    finally:
        server.stop()


def put(folder: Path, url: str) -> None:
    """Every file of a folder into a bucket."""
    for file in sorted(folder.iterdir()):
        upload(file, open_place(f"{url}/{file.name}", OutputError))
