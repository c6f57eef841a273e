"""``tunesmith serve``: the engine, the routes and uvicorn, from the command's options to the last answer."""

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from tunesmith.errors import ConfigError
from tunesmith.free_memory import available_bytes
from tunesmith.models.base import BaseFolder
from tunesmith.models.servable import verified_manifest
from tunesmith.serving.app import create_app
from tunesmith.serving.bases import checkpoint_base, given_bases
from tunesmith.serving.chat import VoiceBox
from tunesmith.serving.footprint import Measure
from tunesmith.serving.hosts import hosts_of
from tunesmith.serving.loading_path import LoadingPath
from tunesmith.serving.memory import Adapter, Base, Memory, Version, size
from tunesmith.serving.metrics import Metrics
from tunesmith.serving.outer_errors import HttpProtocol
from tunesmith.serving.registry import Registry
from tunesmith.serving.request_log import start_request_log, stop_request_log
from tunesmith.serving.seam import Engine
from tunesmith.serving.security import API_KEY, Keys
from tunesmith.serving.service import Service
from tunesmith.starting import search_paused

_IDLE_CONNECTIONS = 512  # beside those of requests that run and wait
_SHARE = 0.8  # of the memory that is free, for models, where --max-memory does not say

Say = Callable[[str], None]
OpenEngine = Callable[[BaseFolder], Engine]


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says.

    Attributes:
        bases: catalog names, folders, hub ids, or runs and tags of full-parameter training.
        root: the loading path.
        max_memory: most bytes of all models together; None: four fifths of what is free.
        output_dirs: where runs and tags are looked for.
        log_contents: whether prompts and answers stand in the log of requests.
        allowed_hosts: names by which it may be asked beside its own, see ``hosts.py``.
    """

    bases: tuple[str, ...]
    root: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_running: int = 16
    max_waiting: int = 64
    grace_seconds: int = 30
    max_memory: int | None = None
    output_dirs: tuple[Path, ...] = ()
    log_contents: bool = False
    allowed_hosts: tuple[str, ...] = ()


def serve(options: ServeOptions, say: Say) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what runs within the grace time.

    Raises:
        ConfigError: an option, a name or a key cannot be used, or a base can never fit into the memory.
        ModelError, CheckpointError: a base cannot be found or served.
    """
    keys = Keys.from_environment()
    hosts = hosts_of(options.host, options.allowed_hosts, has_key=keys.api is not None)
    if options.root is not None and not options.root.is_dir():
        raise ConfigError(
            "--dynamic-lora-loading-path", f"{options.root} is no folder", "name a folder of adapters"
        )
    listener = bind(options.host, options.port)
    start_request_log(contents=options.log_contents)
    try:
        places = [*options.output_dirs, *([options.root] if options.root else [])]
        with search_paused():
            measure, open_engine = _engines(options)
            bases = given_bases(options.bases, places, measure, say)
            limit = options.max_memory or _free_share()
            service = build_service(bases, options.root, keys, say, measure, open_engine, limit)
        service.hosts = hosts
        try:
            if keys.api is None and not is_loopback(options.host):
                say(f"Anybody who reaches {options.host} may use this server: {API_KEY} is not set")
            server = DrainingServer(service, options.grace_seconds, say)
            asyncio.run(server.serve([listener]))
        finally:
            service.memory.close()
    finally:
        stop_request_log()
        listener.close()


def build_service(
    bases: Sequence[Base],
    root: Path | None,
    keys: Keys,
    say: Say,
    measure: Measure,
    open_engine: OpenEngine,
    limit: int | None,
) -> Service:
    """The service of some bases, as many of them loaded as there is room for, and of all in the loading path.

    Args:
        bases: of the command line, one at least.
        root: the loading path.
        keys: of clients and administrators.
        say: told what goes wrong with a model.
        measure: of a base's memory, with the settings that ``open_engine`` uses.
        open_engine: loads a base and starts its engine.
        limit: most bytes of all models together, None: any number.

    Raises:
        ConfigError: a base alone needs more than that.
        ModelError, CheckpointError: one cannot be loaded.
    """
    for base in bases:
        if limit is not None and base.bytes > limit:
            fault = f"{base.name} needs {size(base.bytes)} with its cache, models may have {size(limit)} here"
            raise ConfigError("--max-memory", fault, "raise it, lower --max-running, or take a smaller model")
    box = VoiceBox()

    def opened(base: Base) -> Version:
        verified_manifest(base.folder.path)
        engine = open_engine(base.folder)
        try:
            return Version(base.name, None, None, box.of_base(base.folder), engine)
        except BaseException:
            engine.close()
            raise

    def read(adapter: Adapter, on: Version) -> Version:
        voice = box.of_adapter(adapter.folder, adapter.name, on.voice)
        return Version(adapter.name, on.name, on.engine.load(adapter.folder), voice, on.engine)

    # A base of the command line that cannot be loaded is told by the error that ends the command.
    memory = Memory(limit, opened, read)
    try:
        if len(bases) > 1 or any(kind == "base" for _, _, kind in LoadingPath(root).models()):
            for base in bases:
                _ = base.fingerprint  # tells apart which adapter is whose; not while requests wait for it
        _load_given(memory, bases)
    except BaseException:
        memory.close()
        raise
    memory.report = say
    registry = Registry(
        bases, root, memory, lambda name, folder: checkpoint_base(name, folder, measure), report=say
    )
    return Service(
        memory, registry, keys, Metrics(), measure.running, len(bases) * (measure.running + measure.waiting)
    )


def _load_given(memory: Memory, bases: Sequence[Base]) -> None:
    """In their order while there is room; the others are loaded when they are asked for."""
    for base in bases:
        if memory.has_room(base):
            with memory.claim() as claim:
                claim.hold(base).result()


class DrainingServer(uvicorn.Server):
    """uvicorn that ends with what runs, and without raising the signal that ended it once more.

    Args:
        service: is told that it stops.
        grace_seconds: what still runs after this is cut off.
        say: told where the server listens, and when it stops.
    """

    def __init__(self, service: Service, grace_seconds: int, say: Say) -> None:
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http=HttpProtocol,  # whatever else is installed: Ray Serve brings another parser, with other bounds
            timeout_graceful_shutdown=grace_seconds,
        )
        super().__init__(config)
        self._service, self._say = service, say
        self._most_connections = service.most_requests + _IDLE_CONNECTIONS
        service.is_crowded = self._is_crowded  # uvicorn's own limit_concurrency would answer in plain text

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

    def _is_crowded(self) -> bool:
        state = self.server_state
        return max(len(state.connections), len(state.tasks)) >= self._most_connections

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
        bases = [base.name for base in self._service.registry.bases]
        listed = self._service.registry.listed()
        adapters = sum(model.parent is not None for model in listed)
        parts = [*bases, "1 adapter" if adapters == 1 else f"{adapters} adapters"]
        if further := len(listed) - len(bases) - adapters:
            parts.insert(-1, "1 checkpoint" if further == 1 else f"{further} checkpoints")
        self._say(f"Serving {', '.join(parts[:-1])} and {parts[-1]} at http://{shown}:{port}/v1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs, within the grace time."""
        active = sum(self._service.metrics.active.values())
        self._say(f"Stopping; {active} request{'' if active == 1 else 's'} to finish")
        await super().shutdown(sockets)


def _engines(options: ServeOptions) -> tuple[Measure, OpenEngine]:
    from tunesmith.serving.engine import EngineSettings
    from tunesmith.serving.engines import open_engine

    settings = EngineSettings(running=options.max_running, waiting=options.max_waiting)
    measure = Measure(settings.running, settings.waiting, settings.context_length, settings.prefix_tokens)
    return measure, lambda base: open_engine(base, settings)


def _free_share() -> int | None:
    free = available_bytes()
    return None if free is None else int(_SHARE * free)


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


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
