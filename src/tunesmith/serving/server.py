"""``tunesmith serve``: the engine, the routes and uvicorn, from the command's options to the last answer."""

import asyncio
import ipaddress
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from tunesmith.checkpoints.naming import short_model_name
from tunesmith.errors import ConfigError
from tunesmith.models.base import BaseFolder, find_base
from tunesmith.serving.app import create_app
from tunesmith.serving.chat import VoiceBox
from tunesmith.serving.metrics import Metrics
from tunesmith.serving.protocol import MAX_NAME, NAME
from tunesmith.serving.registry import Registry
from tunesmith.serving.request_log import start_request_log, stop_request_log
from tunesmith.serving.seam import Engine
from tunesmith.serving.security import API_KEY, Keys
from tunesmith.serving.service import Service

_IDLE_CONNECTIONS = 512  # beside those of requests that run and wait

Say = Callable[[str], None]


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says; ``root`` is the loading path."""

    base: str
    root: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_running: int = 16
    max_waiting: int = 64
    grace_seconds: int = 30
    log_contents: bool = False


def serve(options: ServeOptions, say: Say) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what runs within the grace time.

    Raises:
        ConfigError: an option or a key cannot be used.
        ModelError: the base cannot be found or served.
    """
    keys = Keys.from_environment()
    if options.root is not None and not options.root.is_dir():
        raise ConfigError(
            "--dynamic-lora-loading-path", f"{options.root} is no folder", "name a folder of adapters"
        )
    listener = bind(options.host, options.port)
    start_request_log(contents=options.log_contents)
    try:
        base = find_base(options.base, say=say)
        engine = _engine(base, options)
        try:
            service = build_service(engine, base, options.root, keys, say)
            if keys.api is None and not _is_loopback(options.host):
                say(f"Anybody who reaches {options.host} may use this server: {API_KEY} is not set")
            server = DrainingServer(service, options.grace_seconds, say)
            asyncio.run(server.serve([listener]))
        finally:
            engine.close()
    finally:
        stop_request_log()
        listener.close()


def build_service(engine: Engine, base: BaseFolder, root: Path | None, keys: Keys, say: Say) -> Service:
    """The service of one base and the adapters in ``root``.

    Raises:
        ConfigError: the base's name is none that a request could give.
        ModelError: its tokenizer cannot be read.
    """
    name = short_model_name(base.model_id)
    if not re.fullmatch(NAME.strip("^$"), name) or len(name) > MAX_NAME:
        raise ConfigError("--base", f"{name} is no model name", "rename the folder: a letter or digit first")
    box = VoiceBox()
    voice = box.of_base(base)
    registry = Registry(
        name, voice, root, engine, lambda folder, adapter: box.of_adapter(folder, adapter, voice), report=say
    )
    return Service(engine, registry, keys, Metrics())


class DrainingServer(uvicorn.Server):
    """uvicorn that ends with what runs, and without raising the signal that ended it once more.

    Args:
        service: is told that it stops.
        grace_seconds: what still runs after this is cut off.
        say: told where the server listens, and when it stops.
    """

    def __init__(self, service: Service, grace_seconds: int, say: Say) -> None:
        limits = service.engine.limits
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=grace_seconds,
            limit_concurrency=limits.running + limits.waiting + _IDLE_CONNECTIONS,
        )
        super().__init__(config)
        self._service, self._say = service, say

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle Ctrl-C and SIGTERM while serving; uvicorn's own would end the process by them afterwards."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop accepting."""
        self.stop()
        super().handle_exit(sig, frame)

    def stop(self) -> None:
        """Take no more requests, and end when those at work have ended."""
        self._service.is_stopping = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        host, port, *_ = (sockets or self.servers[0].sockets)[0].getsockname()
        shown = f"[{host}]" if ":" in host else host
        adapters = len(self._service.registry.listed()) - 1
        count = "1 adapter" if adapters == 1 else f"{adapters} adapters"
        self._say(f"Serving {self._service.registry.base.name} and {count} at http://{shown}:{port}/v1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs, within the grace time."""
        active = sum(self._service.metrics.active.values())
        self._say(f"Stopping; {active} request{'' if active == 1 else 's'} to finish")
        await super().shutdown(sockets)


def _engine(base: BaseFolder, options: ServeOptions) -> Engine:
    from tunesmith.serving.engine import EngineSettings
    from tunesmith.serving.engines import open_engine

    return open_engine(base, EngineSettings(running=options.max_running, waiting=options.max_waiting))


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a port that is taken is found out before the model is loaded.

    Raises:
        ConfigError: host or port cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With its protocol: asyncio turns off Nagle's delay, 40 ms an answer, only where the socket names TCP.
        listener = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(
            f"--host {host} --port {port}", f"cannot be listened on ({reason})", "choose another"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
