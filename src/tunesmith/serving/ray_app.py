"""``tunesmith serve --ray``: the same application with its engines on Ray Serve, a deployment for each base.

The routes, keys, names, templates and streams are those of ``server.py`` and run in the command's own process, so
that there is no part whose loss could lose a request that was accepted. What Ray Serve runs are the bases: replicas
that come and go with the load, each with as many adapters as it may hold (``ray_replica.py``); requests for an adapter
go to a replica that has it loaded (its snapshot's name is the ``multiplexed_model_id``).
"""

import asyncio
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, closing, contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.bases import given_bases
from tunesmith.serving.bucket import local_root
from tunesmith.serving.engine import EngineSettings
from tunesmith.serving.footprint import Measure
from tunesmith.serving.hosts import hosts_of
from tunesmith.serving.memory import Base, size
from tunesmith.serving.ray_config import RayConfig, ReplicaSettings
from tunesmith.serving.ray_replica import HeldAdapter, ReplicaPlan, Worker, read_adapter, silence_libraries
from tunesmith.serving.remote_engine import Call, Lost, RemoteEngine, Unread
from tunesmith.serving.replica_facts import read_facts, start_telling
from tunesmith.serving.request_log import start_request_log, stop_request_log
from tunesmith.serving.seam import AdapterKey, Engine, EngineError, EngineFacts, EngineLimits, Token
from tunesmith.serving.security import ADMIN_KEY, API_KEY, Keys
from tunesmith.serving.server import DrainingServer, Say, bind, build_service, is_loopback
from tunesmith.serving.service import Service
from tunesmith.serving.snapshots import Snapshots

_OBJECT_STORE = 100 * 2**20  # bytes; what is sent is a few tokens at a time
_LOOK = 0.1  # seconds between two looks whether a deployment is up
# Read when Ray is imported. Without the second Ray takes the machine's address to the outside for its own. With the
# third it answers to those alone who know the token: whoever may talk to Ray may run programs in its processes.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"
}  # fmt: skip
_TOKEN = "RAY_AUTH_TOKEN"
_NUMBERS = count()  # of applications: one of a name that is there already would take its place
_STARTS = 3  # of a process that fails while it loads the base


def serve_with_ray(config: RayConfig, say: Say) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what runs within the grace time.

    Raises:
        ConfigError: Ray is not installed, a setting or key cannot be used, or there are too few cores.
        ModelError, CheckpointError: a base cannot be found or served.
    """
    check_installed()
    keys = Keys.from_environment()
    hosts = hosts_of(config.host, config.allowed_hosts, has_key=keys.api is not None)
    with ExitStack() as held:
        root = held.enter_context(local_root(config.dynamic_lora_loading_path, say))
        if root is not None and not root.is_dir():
            raise ConfigError(
                "dynamic_lora_loading_path", f"{root} is no folder", "name a folder of adapters"
            )
        listener = held.enter_context(closing(bind(config.host, config.port)))
        start_request_log(contents=config.log_requests)
        held.callback(stop_request_log)
        snapshots = held.enter_context(closing(_snapshots(config.ray.snapshots)))
        held.enter_context(started_ray(config))
        service = build_ray_service(config, root, keys, say, snapshots)
        service.hosts = hosts
        held.callback(service.memory.close)
        if keys.api is None and not is_loopback(config.host):
            say(f"Anybody who reaches {config.host} may use this server: {API_KEY} is not set")
        server = DrainingServer(service, config.grace_seconds, say)
        asyncio.run(server.serve([listener]))


def check_installed() -> None:
    """Raise ConfigError unless Ray Serve is here."""
    os.environ.update(_SETTINGS)
    os.environ.setdefault(_TOKEN, secrets.token_hex(32))
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise ConfigError("--ray", f"needs {error.name}", "run: pip install 'tunesmith[ray]'") from error


@contextmanager
def started_ray(config: RayConfig) -> Iterator[None]:
    """A Ray of our own on 127.0.0.1, with Ray Serve and without its HTTP; ended afterwards.

    Raises:
        ConfigError: there are too few cores for what has to run.
    """
    import ray
    from ray import serve

    cores = os.cpu_count() or 1
    if config.least_cpus > cores:
        fault = f"the bases need {config.least_cpus:g} cores, there are {cores}"
        raise ConfigError("bases", fault, "lower cpus or min_replicas")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with _without_keys():  # the processes of Ray inherit the environment
        ray.init(
            address="local", num_cpus=cores, include_dashboard=config.ray.dashboard, dashboard_host="127.0.0.1",
            object_store_memory=_OBJECT_STORE, log_to_driver=False, logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )  # fmt: skip
    try:
        serve.start(
            proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False}
        )
        yield
    finally:
        ray.shutdown()  # ends every process; Ray Serve's own end would only wait for idle ones


def build_ray_service(
    config: RayConfig, root: Path | None, keys: Keys, say: Say, snapshots: Snapshots
) -> Service:
    """The service whose engines are on Ray Serve, which has been started.

    Raises:
        ConfigError: a base alone needs more memory than a process of it may have.
        ModelError, CheckpointError: one cannot be found or loaded.
    """
    settings = EngineSettings(running=config.max_running, waiting=config.max_waiting + config.max_running)
    measure = Measure(settings.running, settings.waiting, settings.context_length, settings.prefix_tokens)
    places = [*map(Path, config.output_dirs), *([root] if root else [])]
    bases = given_bases([base.base for base in config.bases], places, measure, say)
    by_folder: dict[Path, ReplicaSettings] = {}
    for base, own in zip(bases, config.bases, strict=True):
        by_folder[base.folder.path] = own
        _check_memory(base, own)

    def opened(folder: BaseFolder) -> Engine:
        own = by_folder.get(folder.path, config.checkpoints)
        absolute = replace(folder, path=folder.path.resolve())
        most_adapters = own.max_num_multiplexed_models_per_replica
        facts = Path(mkdtemp(prefix="facts-", dir=snapshots.root))
        plan = ReplicaPlan(absolute, settings, snapshots.root, most_adapters, facts)
        deployed = Deployed.deploy(plan, own, config, f"{next(_NUMBERS)}-{_slug(folder.model_id)}")
        try:
            context_length, vocabulary = deployed.limits()
        except BaseException:
            deployed.close()
            raise
        limits = EngineLimits(
            context_length, vocabulary, config.max_running * own.max_replicas, config.max_waiting
        )
        return RemoteEngine(deployed, limits, snapshots)

    service = build_service(bases, root, keys, say, measure, opened, None)
    replicas = [own.max_replicas for own in config.bases]
    service.most_running = config.max_running * max(replicas)
    service.most_requests = config.max_running * sum(replicas) + config.max_waiting * len(replicas)
    return service


class Deployed:
    """``Replicas`` of remote_engine.py: an application of Ray Serve that is one deployment.

    Args:
        handle: of the deployment.
        name: of the application.
        facts: the folder into which the replicas tell what they do; goes with ``close``.
    """

    def __init__(self, handle: Any, name: str, facts: Path) -> None:
        self._handle, self._name, self._facts = handle, name, facts
        self._answers = handle.options(stream=True, method_name="answer")

    @classmethod
    def deploy(cls, plan: ReplicaPlan, own: ReplicaSettings, config: RayConfig, name: str) -> "Deployed":
        """Deploy and wait for the first replica.

        Raises:
            ModelError: it does not come up in time, or cannot load the base.
        """
        from ray import serve

        options: dict[str, Any] = {"num_cpus": own.cpus}
        if own.memory_bytes is not None:
            options["memory"] = own.memory_bytes
        deployment = serve.deployment(
            deployment_class(plan.most_adapters),
            name=name,
            ray_actor_options=options,
            max_ongoing_requests=config.max_running,
            graceful_shutdown_timeout_s=config.grace_seconds,
            max_constructor_retry_count=_STARTS,
            **_replicas(own),
        )
        target = serve.RunTarget(deployment.bind(plan), name=name, route_prefix=None)
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        try:
            _wait(name, plan.base.model_id, config.ray.start_seconds)
        except BaseException:
            cls(handle, name, plan.facts).close()
            raise
        return cls(handle, name, plan.facts)

    def limits(self) -> tuple[int, int]:
        """Context length and vocabulary, in tokens."""
        found: tuple[int, int] = self._handle.options(method_name="limits").remote().result()
        return found

    async def answers(self, call: Call) -> AsyncGenerator[tuple[Token, ...] | EngineError, None]:
        """See ``Replicas``."""
        handle = self._answers
        if call.adapter is not None:
            handle = handle.options(multiplexed_model_id=call.adapter)
        with _told_as_lost():
            response = handle.remote(call)
        is_whole = False
        try:
            with _told_as_lost():
                async for items in response:
                    yield items
            is_whole = True
        finally:
            if not is_whole:
                with suppress(Exception):  # where the call has failed, cancelling raises its error once more
                    response.cancel()

    async def read(self, adapter: str) -> AdapterKey | Unread:
        """See ``Replicas``."""
        handle = self._handle.options(method_name="read", multiplexed_model_id=adapter)
        with _told_as_lost():
            found: AdapterKey | Unread = await handle.remote(adapter)
        return found

    def facts(self) -> dict[str, EngineFacts]:
        """See ``Replicas``."""
        return read_facts(self._facts)

    def close(self) -> None:
        """See ``Replicas``."""
        from ray import serve

        with suppress(Exception):  # Ray itself is gone
            serve.delete(self._name, _blocking=False)
        shutil.rmtree(self._facts, ignore_errors=True)


def deployment_class(most_adapters: int) -> type:
    """The class of a deployment whose replicas each hold so many adapters."""
    from ray import serve

    class Replica:
        def __init__(self, plan: ReplicaPlan) -> None:
            silence_libraries()
            _stay_on_loopback()
            self.worker = Worker(plan)
            start_telling(plan.facts, self.worker.facts)

        @serve.multiplexed(max_num_models_per_replica=most_adapters)  # type: ignore[untyped-decorator]
        async def adapter(self, name: str) -> HeldAdapter:
            return await self.worker.threads.run("load", self.worker.load, name)

        async def answer(self, call: Call) -> AsyncGenerator[tuple[Token, ...] | EngineError, None]:
            async with aclosing(self.worker.answer(call, self.adapter)) as answers:
                async for items in answers:
                    yield items

        async def read(self, name: str) -> AdapterKey | Unread:
            return await read_adapter(name, self.adapter)

        def limits(self) -> tuple[int, int]:
            return self.worker.limits()

        def facts(self) -> tuple[int, EngineFacts]:
            return os.getpid(), self.worker.facts()

    return Replica


def _stay_on_loopback() -> None:
    """Before the replica listens: Ray Serve 2.60 lets it do so on every address, and has no setting for that."""
    from ray.serve._private import replica

    listen = getattr(replica, "add_port_to_grpc_server", None)
    if listen is not None:
        replica.add_port_to_grpc_server = lambda server, place: listen(
            server, place.replace("[::]", "127.0.0.1")
        )


def _replicas(own: ReplicaSettings) -> dict[str, Any]:
    if own.min_replicas == own.max_replicas:
        return {"num_replicas": own.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": own.min_replicas,
            "max_replicas": own.max_replicas,
            "target_ongoing_requests": own.target_ongoing_requests,
            "upscale_delay_s": own.upscale_delay_seconds,
            "downscale_delay_s": own.downscale_delay_seconds,
        }
    }


def _wait(name: str, model: str, seconds: int) -> None:
    """Until an application runs; ModelError where it does not."""
    from ray import serve

    until = time.monotonic() + seconds
    while True:
        found = serve.status().applications.get(name)
        state = str(found.status.value) if found is not None else "NOT_STARTED"
        if state == "RUNNING":
            return
        if found is not None and state in ("DEPLOY_FAILED", "UNHEALTHY"):
            told = [found.message, *(part.message for part in found.deployments.values())]
            raise ModelError(model, f"cannot be loaded on Ray Serve ({_reason(told)})", "see Ray's logs")
        if time.monotonic() > until:
            remedy = "raise ray.start_seconds, or lower cpus, memory_gb or min_replicas"
            raise ModelError(model, f"has no process on Ray Serve after {seconds} s", remedy)
        time.sleep(_LOOK)


def _reason(messages: list[str]) -> str:
    """The last error named in Ray's reports, which are tracebacks."""
    lines = [line.strip() for text in messages for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|NotServed): ", line)]
    return (errors or lines or ["no reason given"])[-1][:300]


@contextmanager
def _told_as_lost() -> Iterator[None]:
    """Errors of our code in a replica become an EngineError, and all others ``Lost``.

    Which errors Ray has for a process that is gone depends on the moment and on its version; and asking another
    process in vain does no harm, as the attempts are counted.
    """
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Lost("cancelled by Ray") from error  # the replica is ending
    except DeploymentUnavailableError as error:
        raise EngineError("no process could be started") from error
    except RayTaskError as error:
        if isinstance(error.cause, RayActorError):  # what our code was sent did not come
            raise Lost(type(error.cause).__name__) from error
        raise EngineError(f"the replica failed ({type(error.cause).__name__})") from error
    except Exception as error:
        raise Lost(type(error).__name__) from error


def _snapshots(place: str | None) -> Snapshots:
    try:
        return Snapshots(Path(place) if place else None)
    except OSError as error:
        fault = f"{place} cannot be written ({error.strerror})"
        raise ConfigError("ray.snapshots", fault, "name another folder") from error


def _check_memory(base: Base, own: ReplicaSettings) -> None:
    if own.memory_bytes is not None and base.bytes > own.memory_bytes:
        fault = f"{base.name} needs {size(base.bytes)} with its cache, memory_gb is {own.memory_gb:g}"
        raise ConfigError("bases", fault, "raise it, lower max_running, or take a smaller model")


@contextmanager
def _without_keys() -> Iterator[None]:
    taken = {name: os.environ.pop(name) for name in (API_KEY, ADMIN_KEY) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _slug(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2])[:64] or "base"
