"""Adapters that appear, change or go while vLLM runs, told to it through its own routes for loading."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.serving.loading_path import LoadingPath, Stamp, stamp_of

_SECONDS_BETWEEN = 2.0
_SECONDS_TO_ANSWER = 300.0  # loading the first adapter of a large model takes long

Say = Callable[[str], None]
Send = Callable[[str, Mapping[str, Any]], None]


class VllmRefusal(Exception):
    """vLLM answered with an error; the message is its own."""


class Watcher(threading.Thread):
    """Looks at the loading path again and again, once vLLM answers.

    Args:
        root: the loading path.
        known: names and stamps of the adapters that vLLM was started with.
        is_usable: (name, folder) -> whether vLLM takes it; says why not.
        send: (route, body) -> sends it to vLLM, see ``sender``.
        is_up: whether vLLM answers yet.
        say: told what is loaded and what is not.
        seconds: between two looks.
    """

    def __init__(
        self,
        root: Path,
        known: Mapping[str, Stamp],
        is_usable: Callable[[str, Path], bool],
        send: Send,
        is_up: Callable[[], bool],
        say: Say,
        seconds: float = _SECONDS_BETWEEN,
    ) -> None:
        super().__init__(daemon=True, name="vllm adapters")
        self._path, self._is_usable, self._send, self._is_up = LoadingPath(root), is_usable, send, is_up
        self._say, self._seconds = say, seconds
        self._loaded = set(known)
        self._seen: dict[str, Stamp] = dict(known)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End at the next look."""
        self._stopped.set()

    def run(self) -> None:
        """See the class."""
        while not self._stopped.wait(self._seconds):
            if self._is_up():
                self.look()

    def look(self) -> None:
        """One look: whatever is new or other than before is loaded, whatever is gone unloaded."""
        there = {name: folder for name, folder, kind in self._path.models() if kind == "adapter"}
        for name, folder in there.items():
            stamp = stamp_of(folder)
            if self._seen.get(name) == stamp:
                continue
            self._seen[name] = stamp  # told once, whatever comes of it
            if self._is_usable(name, folder):
                self._load(name, folder)
        for name in self._seen.keys() - there.keys():
            del self._seen[name]
            if name in self._loaded:
                self._tell("unload", name, {"lora_name": name})
                self._loaded.discard(name)

    def _load(self, name: str, folder: Path) -> None:
        body = {"lora_name": name, "lora_path": str(folder.resolve()), "load_inplace": name in self._loaded}
        if self._tell("load", name, body):
            self._loaded.add(name)

    def _tell(self, what: str, name: str, body: Mapping[str, Any]) -> bool:
        try:
            self._send(f"/v1/{what}_lora_adapter", body)
        except (VllmRefusal, OSError) as error:
            self._say(f"model {name}: vLLM did not {what} it ({error})")
            return False
        self._say(f"model {name}: {what}ed")
        return True


def sender(url: str, key: str) -> Send:
    """Sends a body to a route of the server at ``url``."""

    def send(route: str, body: Mapping[str, Any]) -> None:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{url}{route}", json.dumps(body).encode(), headers)
        try:
            with _direct().open(request, timeout=_SECONDS_TO_ANSWER):
                pass
        except urllib.error.HTTPError as error:
            raise VllmRefusal(_message(error)) from error

    return send


def answers(url: str) -> bool:
    """Whether a server at ``url`` is alive."""
    try:
        with _direct().open(f"{url}/health", timeout=5):
            return True
    except (OSError, ValueError):
        return False


def _direct() -> urllib.request.OpenerDirector:
    # The key must not go through a proxy that the environment names.
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _message(error: urllib.error.HTTPError) -> str:
    try:
        text = str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        text = f"status {error.code}"
    return " ".join(text.split())[:300]
