"""A server as a child process: started, waited for, watched, ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from peers.children import error_line

HERE = Path(__file__).resolve().parent
_POLL_SECONDS = 0.02
ADMIN_KEY = "admin-of-the-benchmark"  # of a server on 127.0.0.1 that lives as long as the benchmark
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


class ServerFailed(Exception):
    """A server did not start or did not stay; the message is one line."""


@dataclass
class Server:
    """A child that serves HTTP on a free port, within a ``with`` block.

    Args:
        name: of the engine.
        command: with "{port}" where the port belongs.
        environment: added to this process's.
        log: of its output.
        health: the route that answers 200 once it serves.
        limit_seconds: of its start.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    health: str = "/health"
    limit_seconds: float = 300
    start_seconds: float = 0.0
    url: str = ""
    exit_code: int | None = None
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [part.replace("{port}", str(port)) for part in self.command]
        began = time.perf_counter()
        with self.log.open("wb") as output:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait(began)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self, began: float) -> None:
        with httpx.Client(base_url=self.url, timeout=5, trust_env=False) as client:
            while True:
                self.check()
                with suppress(httpx.HTTPError):  # not yet
                    if client.get(self.health).status_code == 200:
                        self.start_seconds = time.perf_counter() - began
                        return
                if time.perf_counter() - began > self.limit_seconds:
                    raise ServerFailed(f"{self.name} did not serve within {self.limit_seconds:.0f} s")
                time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raise ServerFailed if the child has ended."""
        if self._child is None or self._child.poll() is not None:
            code = self._child.returncode if self._child else "none"
            raise ServerFailed(f"{self.name} ended: {error_line(self.log)} (exit code {code})")

    @property
    def pid(self) -> int:
        """Of the child."""
        assert self._child is not None
        return self._child.pid

    def rss_bytes(self) -> int:
        """Resident memory of the child and all it has started; pages they share count in each."""
        parent = psutil.Process(self.pid)
        total = 0
        for process in (parent, *parent.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def reads(self) -> dict[str, int] | None:
        """Bytes read so far: "read_bytes" from the disk, "rchar" by system calls, from memory too; Linux alone."""
        path = Path(f"/proc/{self.pid}/io")
        if not path.exists():
            return None
        pairs = (line.split(": ") for line in path.read_text(encoding="ascii").splitlines())
        found = {name: int(value) for name, value in pairs}
        return {name: found[name] for name in ("read_bytes", "rchar")}

    def client(self, **more: Any) -> httpx.Client:
        """A client that may load and unload."""
        return httpx.Client(
            **{"base_url": self.url, "timeout": 120, "headers": ADMIN, "trust_env": False, **more}
        )

    def base_name(self) -> str:
        """The base's name as the server calls it."""
        with self.client() as client:
            models = client.get("/v1/models").json()["data"]
        return str(next(model["id"] for model in models if not model.get("parent")))

    def stop(self) -> None:
        """Ask it to end, and end it where it does not. Its exit code is noted."""
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.exit_code = self._child.wait(60)
        self._kill()

    def _kill(self) -> None:
        if self._child is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)  # the session is the child's own
        code = self._child.wait()
        self.exit_code = code if self.exit_code is None else self.exit_code
        self._child = None


def tunesmith_server(
    base: str, root: Path, log: Path, threads: int | None, options: Sequence[str] = ()
) -> Server:
    """Our own server of ``base`` and the adapters in ``root``."""
    start = "import sys; from tunesmith.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "serve", "--base", base, "--dynamic-lora-loading-path", str(root)]
    environment = {"TUNESMITH_ADMIN_KEY": ADMIN_KEY, "HF_HUB_OFFLINE": "1", **thread_environment(threads)}
    path = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    return Server("tunesmith", [*command, "--port", "{port}", *options], environment, log)


def thread_environment(threads: int | None) -> dict[str, str]:
    """What tells PyTorch how many threads to use; None: its own choice."""
    return {} if threads is None else {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def end_with_children() -> None:
    """Make SIGTERM end this process as an error would, so that no server is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run_client(job: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Run serving_client.py on a job; ServerFailed where it fails."""
    asked, told = work / "client-job.json", work / "client-result.json"
    asked.write_text(json.dumps(job), encoding="utf-8")
    told.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "serving_client.py"), str(asked), str(told)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ServerFailed(f"the client failed: {last[:300]}")
    result: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return result


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
