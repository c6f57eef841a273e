"""Ray, started or joined."""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunesmith.errors import ConfigError, RunError
from tunesmith.storage.urls import shown

ADDRESS = "RAY_ADDRESS"
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_ANSWER_SECONDS = 5.0  # that the head of a cluster may take to accept a connection
_STARTS = 2  # of a Ray of our own: on a machine with much else to do it may give itself up
_STORE_BYTES = 2**28  # of Ray's shared memory: only messages go through it

# Read by Ray when it is imported or started.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # settings name files from where the command was given
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # print() writes to standard output, and so to the worker's log
}


def import_ray(place: str) -> Any:
    """The package, with Ray Train. Raises ConfigError where the extra is not installed."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if address() is None:
        # As on a desktop, where Ray's own processes talk over loopback: nobody else is to reach them. Nor is another
        # user of this machine: who may talk to Ray may run programs in its processes.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if not any(name in os.environ for name in _TOKENS):
            os.environ[_TOKENS[0]] = secrets.token_hex(32)
    if any(name in os.environ for name in _TOKENS):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # which Ray reads when it is imported
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise ConfigError(place, "above 1 needs Ray Train", "run: pip install 'tunesmith[ray]'") from error
    return ray


def address() -> str | None:
    """Of the cluster to join, as ``RAY_ADDRESS`` says; None: one of this process's own."""
    given = os.environ.get(ADDRESS, "").strip()
    return None if given in ("", "local") else given


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connected(ray: Any, workers: int) -> Iterator[None]:
    """Within the block this process is joined to a cluster: that of ``RAY_ADDRESS``, or one of its own.

    A cluster of its own has this machine's cores, and at least one for each worker; it listens on loopback and ends
    with the block.

    Raises:
        ConfigError: there is no cluster at the address.
        RunError: Ray does not start here.
    """
    if ray.is_initialized():
        yield
        return
    given = address()
    if given is None:
        os.environ.pop(ADDRESS, None)  # blank, or "local", which Ray would read otherwise than we do
        _start(ray, workers)
    else:
        _join(ray, given)
    try:
        yield
    finally:
        ray.shutdown()


_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def _join(ray: Any, given: str) -> None:
    given = _found_here() if given == "auto" else given
    _refuse_silent(given)
    try:
        ray.init(address=given, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if type(error).__name__ == "AuthenticationError":
            raise ConfigError(
                ADDRESS, f"the cluster at {given} asks for its token", f"set {_TOKENS[0]}, or {_TOKENS[1]}"
            ) from error
        reason = " ".join(str(error).split())[:200]
        # Somebody listens there; that a token is missing or wrong Ray writes to its log alone.
        hint = f"; where it asks for a token, check {_TOKENS[0]}, or {_TOKENS[1]}"
        raise _no_cluster(given, reason, hint) from error


def _found_here() -> str:
    """The cluster of this machine that Ray means by ``auto``; it may have ended without taking its note away."""
    from ray._private.services import get_ray_address_from_environment

    try:
        return str(get_ray_address_from_environment("auto", None))
    except ConnectionError as error:
        raise ConfigError(
            ADDRESS, "auto finds no cluster on this machine", f"start one, or unset {ADDRESS}"
        ) from error


def _refuse_silent(given: str) -> None:
    """Refuse an address where nobody listens: Ray itself would ask there for minutes, deaf to signals."""
    if "://" in given:
        remedy = "give HOST:6379 of its head; to a dashboard at http://… runs go by: tunesmith submit"
        raise ConfigError(ADDRESS, f"{shown(given)} is not where a cluster takes workers", remedy)
    host, _, port = given.rpartition(":")
    if not (host and port.isdigit() and int(port) < 2**16):
        raise ConfigError(ADDRESS, f"{shown(given)} is no address", "give HOST:6379 of the cluster's head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        raise _no_cluster(given, error.strerror or str(error)) from error


def _no_cluster(given: str, reason: str, hint: str = "") -> ConfigError:
    return ConfigError(
        ADDRESS, f"no cluster at {shown(given)} ({reason})", f"start it, or unset {ADDRESS}{hint}"
    )


def _start(ray: Any, workers: int) -> None:
    """A cluster of this process's own."""
    for left in reversed(range(_STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=max(cores(), workers),
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **_QUIET,
            )
            return
        except Exception as error:  # Ray raises Exception itself where its processes do not come up
            ray.shutdown()
            if left:
                continue
            reason = " ".join(str(error).split())[:200]
            remedy = "look into its logs (ray/session_latest/logs below the temporary folder), or set num_devices to 1"
            raise RunError("Ray", f"does not start on this machine ({reason})", remedy) from error
