"""Over plain HTTP on loopback: servers without ranges, without sizes, and answers that end too soon."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tunesmith.data.sources import read_records
from tunesmith.errors import DataError
from tunesmith.storage.blocks import download
from tunesmith.storage.places import look, open_place

pytest.importorskip("aiohttp")
CONTENT = b'{"text": "one"}\n' * 5000


class Handler(BaseHTTPRequestHandler):
    """``cuts`` answers end after half of their bytes; ``has_ranges``, ``has_size``: what the server can."""

    cuts, has_ranges, has_size = 0, True, True
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(is_head=True)

    def do_GET(self):
        self.answer(is_head=False)

    def answer(self, is_head):
        kind = type(self)
        if self.path != "/x.jsonl":
            self.send_error(404)
            return
        body, status = CONTENT, 200
        ranged = self.headers.get("Range", "")
        if kind.has_ranges and ranged.startswith("bytes="):
            start, _, end = ranged.removeprefix("bytes=").partition("-")
            body, status = CONTENT[int(start or 0) : int(end or len(CONTENT) - 1) + 1], 206
        self.send_response(status)
        if kind.has_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if kind.has_size:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if is_head:
            return
        if kind.cuts and len(body) > 1000:
            kind.cuts -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)


@pytest.fixture
def web():
    kind = type("Own", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kind.url = f"http://127.0.0.1:{server.server_port}/x.jsonl"
    yield kind
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("has_ranges", [True, False])
def test_answers_that_end_too_soon_are_asked_for_again(web, tmp_path, has_ranges):
    web.has_ranges, web.cuts = has_ranges, 3
    download(open_place(web.url, DataError), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert web.cuts == 0


@pytest.mark.parametrize("has_ranges", [True, False])
def test_answers_that_always_end_too_soon_are_never_taken(web, tmp_path, has_ranges):
    web.has_ranges, web.cuts = has_ranges, 10_000
    with pytest.raises(DataError, match="cannot be reached"):
        download(open_place(web.url, DataError), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="cannot be reached"):
        list(read_records(web.url))


def test_rows_of_a_server_without_ranges(web):
    web.has_ranges = False
    assert len(list(read_records(web.url))) == 5000


def test_a_file_without_a_size_is_not_taken_as_a_whole_one(web, tmp_path):
    web.has_ranges = web.has_size = False
    with pytest.raises(DataError, match="its size is not told"):
        download(open_place(web.url, DataError), tmp_path / "x")


def test_a_missing_page(web, tmp_path):
    assert look(open_place(web.url + "no", DataError)) is None
    with pytest.raises(DataError, match="not found"):
        download(open_place(web.url + "no", DataError), tmp_path / "x")
