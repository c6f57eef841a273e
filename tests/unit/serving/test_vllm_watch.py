"""Adapters that appear, change and go while vLLM runs, against a plain HTTP server that records what it is told."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from serving_parts import save_adapter, wait_for
from tunesmith.serving.loading_path import stamp_of
from tunesmith.serving.vllm_watch import VllmRefusal, Watcher, answers, sender


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "red", 1)


class Fixture:
    """A watcher on a folder, with lists in place of vLLM."""

    def __init__(self, root: Path, known: dict[str, Any] | None = None) -> None:
        self.root, self.sent, self.said = root, [], []
        self.refused: set[str] = set()
        self.is_broken = False
        self.watcher = Watcher(
            root, known or {}, lambda name, _: name not in self.refused, self._send, lambda: True, self.said.append,
            seconds=0.01,
        )  # fmt: skip

    def _send(self, route: str, body: Any) -> None:
        self.sent.append((route, dict(body)))
        if self.is_broken:
            raise VllmRefusal("no room")

    def look(self) -> list[tuple[str, dict[str, Any]]]:
        """What one look sends."""
        self.sent.clear()
        self.watcher.look()
        return list(self.sent)


@pytest.fixture
def watched(tmp_path: Path) -> Fixture:
    (tmp_path / "root").mkdir()
    return Fixture(tmp_path / "root")


def load(folder: Path, name: str, *, again: bool = False) -> tuple[str, dict[str, Any]]:
    return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), "load_inplace": again}


def test_an_adapter_is_loaded_when_it_appears_in_place_when_it_changes_and_unloaded_when_it_goes(
    watched, adapter
):
    folder = watched.root / "red"
    assert watched.look() == []
    shutil.copytree(adapter, folder)
    assert watched.look() == [load(folder, "red")]
    assert watched.look() == []
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + "\n")
    assert watched.look() == [load(folder, "red", again=True)]
    shutil.rmtree(folder)
    assert watched.look() == [("/v1/unload_lora_adapter", {"lora_name": "red"})]
    assert watched.look() == []
    assert watched.said == ["model red: loaded", "model red: loaded", "model red: unloaded"]


def test_those_it_was_started_with_are_not_loaded_again(tmp_path, adapter):
    folder = tmp_path / "red"
    shutil.copytree(adapter, folder)
    watched = Fixture(tmp_path, {"red": stamp_of(folder)})
    assert watched.look() == []
    shutil.rmtree(folder)
    assert watched.look() == [("/v1/unload_lora_adapter", {"lora_name": "red"})]


def test_one_that_is_not_usable_is_asked_about_once_and_again_when_it_changes(watched, adapter):
    folder = watched.root / "red"
    shutil.copytree(adapter, folder)
    watched.refused.add("red")
    assert watched.look() == watched.look() == []
    watched.refused.clear()
    assert watched.look() == []
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + "\n")
    assert watched.look() == [load(folder, "red")]


def test_what_vllm_refuses_is_said_and_not_unloaded_later(watched, adapter):
    folder = watched.root / "red"
    shutil.copytree(adapter, folder)
    watched.is_broken = True
    assert watched.look() == [load(folder, "red")]
    assert watched.said == ["model red: vLLM did not load it (no room)"]
    shutil.rmtree(folder)
    assert watched.look() == []


def test_the_thread_looks_until_it_is_stopped(watched, adapter):
    watched.watcher.start()
    shutil.copytree(adapter, watched.root / "red")
    wait_for(lambda: watched.said)
    watched.watcher.stop()
    watched.watcher.join(5)
    assert not watched.watcher.is_alive()


class _Recorder(BaseHTTPRequestHandler):
    seen: list[tuple[str, str | None, Any]] = []  # noqa: RUF012 - of the class, read by the test

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers["Authorization"], body))
        self.send_response(200 if body["lora_name"] == "good" else 500)
        self.end_headers()
        if body["lora_name"] == "bad":
            self.wfile.write(json.dumps({"error": {"message": "rank\n too large", "code": 500}}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def recorder() -> Iterator[str]:
    _Recorder.seen.clear()
    server = HTTPServer(("127.0.0.1", 0), _Recorder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_sender_shows_the_key_and_tells_vllm_s_own_words(recorder, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing must go there
    send = sender(recorder, "secret")
    send("/v1/load_lora_adapter", {"lora_name": "good"})
    assert _Recorder.seen == [("/v1/load_lora_adapter", "Bearer secret", {"lora_name": "good"})]
    with pytest.raises(VllmRefusal, match=r"^rank too large$"):
        send("/v1/load_lora_adapter", {"lora_name": "bad"})
    with pytest.raises(VllmRefusal, match=r"^status 500$"):
        send("/v1/load_lora_adapter", {"lora_name": "worse"})


def test_whether_a_server_answers(recorder):
    assert answers(recorder)
    assert not answers("http://127.0.0.1:9")
