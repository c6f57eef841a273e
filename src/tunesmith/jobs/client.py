"""Runs on a cluster, through Ray's job API: sent, followed, asked after, stopped."""

import asyncio
import json
import logging
import os
import re
import secrets
import string
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, Interrupted, RunError, TunesmithError, UserError, printable
from tunesmith.jobs.bundle import CONFIG
from tunesmith.storage.urls import refuse_secrets, shown

ADDRESS = "RAY_ADDRESS"
# Ray takes these for the address, whatever address its client is given.
_OVERRIDES = (ADDRESS, "RAY_API_SERVER_ADDRESS")
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
_AGAIN_SECONDS = 2.0
_LOST = 5  # times that following is taken up again where nothing came in between
_QUIET_SECONDS = 60.0  # without a line, after which the cluster is asked whether the job still goes on
_STOP_SECONDS = 10.0
_NOT_READY, _READY_SECONDS = "No available agent", 120.0  # as a cluster answers that has just been started
_SLOWEST_LINE = 50_000  # bytes a second
_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 60.0  # of one request; Ray's client itself would wait without end

Write = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it; ``message`` is the cluster's own."""

    id: str
    status: str
    message: str
    started: float | None  # seconds since 1970
    ended: float | None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED

    def facts(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "id": self.id,
            "status": self.status,
            "message": self.message,
            "started": self.started,
            "ended": self.ended,
        }


class Cluster:
    """A Ray cluster at the address of its dashboard.

    Args:
        address: ``http://host:port``; None: what ``RAY_ADDRESS`` says.

    Raises:
        ConfigError: there is no address, it is none, or no cluster answers there; or Ray is not installed.
    """

    def __init__(self, address: str | None) -> None:
        self.address = (
            _checked(address, "--address") if address else _checked(os.environ.get(ADDRESS), ADDRESS)
        )
        if any(name in os.environ for name in _TOKENS):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # which Ray reads when it is imported
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise ConfigError(
                "submit", f"needs {error.name or 'ray'}", "run: pip install 'tunesmith[ray]'"
            ) from error

        class Bounded(JobSubmissionClient):
            """Ray's client, which gives up on a cluster that takes a request and does not answer."""

            def _do_request(
                self, method: str, endpoint: str, *, data: bytes | None = None, **options: Any
            ) -> Any:
                # The time to connect is also that in which all of ``data`` has to be sent.
                sending = len(data or b"") / _SLOWEST_LINE
                bounds = {"timeout": (_CONNECT_SECONDS + sending, _ANSWER_SECONDS)}
                return super()._do_request(method, endpoint, data=data, **bounds | options)

        with _told(self.address), _without(_OVERRIDES):
            self._client = Bounded(self.address)
        for chatty in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(chatty).setLevel(logging.ERROR)

    def submit(self, folder: Path, variables: Mapping[str, str], arguments: Sequence[str] = ()) -> str:
        """Send ``folder``, see ``pack``, and fine-tune there as its configuration says; the job's id.

        Args:
            folder: becomes the job's working directory.
            variables: of the job's environment, see ``chosen_variables``.
            arguments: of ``tunesmith finetune``, besides the configuration.

        Raises:
            ConfigError: the cluster cannot be reached or does not take it.
            Interrupted: Ctrl-C, when it may have been taken already.
        """
        name = f"tunesmith-{''.join(secrets.choice(string.ascii_lowercase) for _ in range(8))}"
        command = " ".join(["python -m tunesmith finetune", CONFIG, *arguments])
        # Unbuffered, so that each line is there to follow when it is written.
        environment: dict[str, Any] = {
            "working_dir": str(folder),
            "env_vars": {"PYTHONUNBUFFERED": "1", **variables},
        }
        until = time.monotonic() + _READY_SECONDS
        try:
            while not self._took(name, command, environment, may_fail=time.monotonic() < until):
                time.sleep(_AGAIN_SECONDS)
        except KeyboardInterrupt:
            remedy = f"ask: {self.again('status', name)}"
            raise Interrupted(f"job {name}", "may have been sent already", remedy) from None
        return name

    def _took(self, name: str, command: str, environment: Mapping[str, Any], *, may_fail: bool) -> bool:
        """Send a job; False: the cluster is not ready for any yet, which ``may_fail`` says to bear."""
        values = tuple(environment["env_vars"].values())
        try:
            with _told(self.address, fault="did not take the job", hidden=values):
                self._client.submit_job(entrypoint=command, submission_id=name, runtime_env=dict(environment))
        except ConfigError as error:
            if self._has_taken(name):  # the line broke when it had to answer
                return True
            if may_fail and _NOT_READY in error.fault:
                return False
            raise
        return True

    def job(self, name: str) -> Job:
        """How the job is.

        Raises:
            UserError: there is no such job.
            ConfigError: the cluster cannot be reached.
        """
        if not _ID.match(name):
            raise UserError(f"job {name!r}", "is no job id", "see: tunesmith jobs list")
        with _told(self.address, name):
            info = self._client.get_job_info(name)
        return _job(info)

    def jobs(self) -> list[Job]:
        """Those that the cluster remembers, newest first."""
        with _told(self.address):
            found = [_job(info) for info in self._client.list_jobs() if info.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0, reverse=True)

    def stop(self, name: str) -> Job:
        """End the job by SIGTERM, and by SIGKILL after ``RAY_JOB_STOP_WAIT_TIME_S`` of the cluster, 3 s by default.

        What the run has saved stays; whether it can still save its last step depends on that time. Its end is waited
        for, for some seconds.

        Raises:
            UserError, ConfigError: as ``job``.
        """
        if not (job := self.job(name)).has_ended:
            with _told(self.address, name):
                self._client.stop_job(name)
            until = time.monotonic() + _STOP_SECONDS
            while not (job := self.job(name)).has_ended and time.monotonic() < until:
                time.sleep(_AGAIN_SECONDS / 4)
        return job

    def logs(self, name: str) -> str:
        """All that the job has written so far.

        Raises:
            UserError, ConfigError: as ``job``.
        """
        self.job(name)
        with _told(self.address, name):
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, write: Write) -> Job:
        """Hand on what the job writes until it has ended; a connection that breaks is taken up where it broke.

        Raises:
            UserError, ConfigError: as ``job``; the cluster did not answer again and again.
        """
        self.job(name)
        progress, lost = _Progress(write), 0
        while True:
            before = progress.written
            asyncio.run(self._tail(name, progress))
            try:
                job = self.job(name)
                log = self.logs(name) if job.has_ended else None
            except ConfigError:  # it does not answer now
                log = None
            if log is not None:
                progress.restart()
                progress.take(log)
                return job
            lost = 0 if progress.written > before else lost + 1
            if lost >= _LOST:
                raise ConfigError(
                    self.address, "the log cannot be followed", f"see: {self.again('logs', name)}"
                )
            time.sleep(_AGAIN_SECONDS)

    def again(self, what: str, name: str) -> str:
        """The command that asks for ``what`` of this job."""
        return f"tunesmith jobs {what} {name} --address {self.address}"

    async def _tail(self, name: str, progress: "_Progress") -> None:
        """Hand on what comes, until the job has ended or the connection is no good any more."""
        progress.restart()
        pieces = self._client.tail_job_logs(name)
        waiting = asyncio.ensure_future(_next(pieces))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=_QUIET_SECONDS)
                if done:
                    if (text := waiting.result()) is None:
                        return
                    progress.take(text)
                    waiting = asyncio.ensure_future(_next(pieces))
                elif not await asyncio.to_thread(self._goes_on, name):  # a line may be dead without a word
                    return
        finally:
            waiting.cancel()

    def _goes_on(self, name: str) -> bool:
        with suppress(TunesmithError):
            return not self.job(name).has_ended
        return False

    def _has_taken(self, name: str) -> bool:
        with suppress(TunesmithError):
            return self.job(name).id == name
        return False


class _Progress:
    """Writes a log that is sent from its start each time, but no part of it twice."""

    def __init__(self, write: Write) -> None:
        self.written, self._at, self._write = 0, 0, write

    def restart(self) -> None:
        """The next piece is from the start."""
        self._at = 0

    def take(self, text: str) -> None:
        """A piece of the log, which follows the one before."""
        new = text[max(0, self.written - self._at) :]
        self._at += len(text)
        if new:
            self._write(new)
            self.written = self._at


async def _next(pieces: AsyncIterator[str]) -> str | None:
    """The next piece of a log; None: no more comes over this connection."""
    from aiohttp import ClientError

    try:
        return await anext(pieces)
    except (StopAsyncIteration, OSError, RuntimeError, ValueError, ClientError):
        return None


def chosen_variables(names: Sequence[str]) -> dict[str, str]:
    """The variables of this environment that the job gets: those named, and no other.

    Raises:
        ConfigError: one is not set, or is given with its value, which every user of this machine could read.
    """
    for name in names:
        if not _NAME.match(name):
            fault = "takes the name of a variable and nothing else"
            raise ConfigError(
                "--env", fault, "set it in the environment and give its name, as --env HF_TOKEN"
            )
        if name not in os.environ:
            raise ConfigError(f"--env {name}", "is not set in this environment", f"run: export {name}=…")
    return {name: os.environ[name] for name in names}


def outcome(cluster: Cluster, job: Job) -> None:
    """Raise RunError unless the job has ended well."""
    if job.status == "SUCCEEDED":
        return
    how = "was stopped" if job.status == "STOPPED" else f"ended as {job.status}"
    raise RunError(f"job {job.id}", how, f"its log: {cluster.again('logs', job.id)}")


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Take variables out of the environment for a while."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


def _checked(address: str | None, place: str) -> str:
    if not address:
        remedy = "give --address http://HOST:8265, or set RAY_ADDRESS"
        raise ConfigError("--address", "is missing", remedy)
    refuse_secrets(address, ConfigError)
    if not re.match(r"https?://[^/\s]+/?\Z", address):
        remedy = "give the address of the cluster's dashboard, as http://HOST:8265"
        raise ConfigError(place, f"{shown(address)} is none of a dashboard", remedy)
    return address.rstrip("/")


def _job(info: Any) -> Job:
    def seconds(value: Any) -> float | None:
        return value / 1000 if value else None

    status = str(getattr(info.status, "value", info.status))
    message = printable(" ".join(str(info.message or "").split()))
    return Job(str(info.submission_id), status, message, seconds(info.start_time), seconds(info.end_time))


@contextmanager
def _told(
    address: str, job: str | None = None, fault: str = "no cluster answers", hidden: Sequence[str] = ()
) -> Iterator[None]:
    try:
        yield
    except TunesmithError:
        raise
    except Exception as error:  # Ray's client raises RuntimeError, ConnectionError, and what requests raises
        if type(error).__name__ == "AuthenticationError":
            remedy = f"set {_TOKENS[0]}, or {_TOKENS[1]} to the file with it"
            raise ConfigError(address, "the cluster asks for its token", remedy) from error
        text = printable(" ".join(_hidden(str(error), hidden).split()))
        if job is not None and re.search(r"does not exist|\b404\b", text):
            raise UserError(
                f"job {job}", f"{address} knows no such job", "see: tunesmith jobs list"
            ) from error
        raise ConfigError(address, f"{fault} ({text[:160]})", "check --address") from error


def _hidden(text: str, secrets: Sequence[str]) -> str:
    """``text`` without ``secrets``, also where one of them stands in it as JSON or Python write it."""
    long = [secret for secret in secrets if len(secret) >= 4]  # a shorter one would be found in many a number
    forms = {form for secret in long for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1])}
    for form in sorted(forms, key=len, reverse=True):  # one may be a part of another
        text = text.replace(form, "***")
    return text
