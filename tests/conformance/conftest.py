"""What the tests run against: our own server on tiny models, or any other named in the environment.

TUNESMITH_CONFORMANCE_URL      of the server, up to /v1, on the models of ``conformance_parts.py``
TUNESMITH_CONFORMANCE_FOLDER   where these lie
TUNESMITH_CONFORMANCE_KEY      its API key, if it wants one
TUNESMITH_CONFORMANCE_SERVER   its kind, where that excuses it from a test: see ``KNOWN``
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

import conformance_parts

_SECONDS_TO_START = 120
# Server -> test -> where it is known to differ. Such a test may fail; if it passes the entry is to go.
KNOWN: dict[str, dict[str, str]] = {"vllm": {}}


@dataclass(frozen=True)
class Target:
    """A server that runs. ``expected`` is what ``conformance_parts.py`` wrote."""

    url: str
    key: str
    base: str
    expected: dict[str, Any]

    def answer(self, name: str, kind: str) -> dict[str, Any]:
        """What a model answers by PEFT alone, ``kind`` chat or plain."""
        found: dict[str, Any] = self.expected["answers"]["base" if name == self.base else name][kind]
        return found


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    url = os.environ.get("TUNESMITH_CONFORMANCE_URL")
    if url:
        folder = Path(os.environ["TUNESMITH_CONFORMANCE_FOLDER"])
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        yield Target(url, os.environ.get("TUNESMITH_CONFORMANCE_KEY", "none"), "base", expected)
        return
    folder = conformance_parts.write(tmp_path_factory.mktemp("conformance"))
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    line = [sys.executable, "-m", "tunesmith", "serve", "--base", str(folder / "base"), "--port", "0"]
    line += ["--dynamic-lora-loading-path", str(folder / "adapters")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environ) as child:
        try:
            yield Target(_url_said(child), "none", "base", expected)
        finally:
            child.terminate()


def _url_said(child: "subprocess.Popen[str]") -> str:
    """Where the server says that it listens."""
    assert child.stderr is not None
    timer = threading.Timer(_SECONDS_TO_START, child.kill)
    timer.start()
    said = []
    try:
        for line in child.stderr:
            said.append(line)
            if found := re.search(r"http://\S+/v1", line):
                threading.Thread(target=child.stderr.read, daemon=True).start()  # lest the pipe fills
                return found[0]
    finally:
        timer.cancel()
    raise AssertionError(f"the server did not start: {''.join(said)[-2000:]}")


@pytest.fixture
def client(target: Target) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=target.url, api_key=target.key, max_retries=0, timeout=120) as found:
        yield found


@pytest.fixture(params=["base", "red", "green"])
def name(request: pytest.FixtureRequest) -> str:
    """Each model of the server in turn."""
    return str(request.param)


@pytest.fixture(autouse=True)
def known_difference(request: pytest.FixtureRequest) -> None:
    """Marks tests in which the server is known to differ."""
    reasons = KNOWN.get(os.environ.get("TUNESMITH_CONFORMANCE_SERVER", ""), {})
    if reason := reasons.get(request.node.originalname):
        request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))
