"""Events to MLflow tracking."""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import ConfigError
from tunesmith.tracking.events import Event, RunFinished, RunStarted
from tunesmith.tracking.jsonl import plain
from tunesmith.tracking.scalars import Scalar, scalars
from tunesmith.tracking.trouble import Trouble

_PLACE = "logger.provider_config"
_MAX_METRICS = 1000  # most that MLflow takes in one call
_MAX_PARAMS = 100
_CLOSE_SECONDS = 60.0  # how long the end of a run waits for a server that does not answer
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class MlflowSink:
    """Logs to one MLflow run, from a thread of its own: a slow server never delays a step.

    Args:
        tracking_uri: server address, database address or local folder; None leaves the choice to
            MLflow (``MLFLOW_TRACKING_URI``).
        experiment_name: experiment to log to; None is MLflow's "Default".
        create_experiment_if_not_exists: whether a missing experiment is made or is an error.
        run_name: name shown for the run; None takes the run's own name.
        resumed_id: the MLflow run to go on with; None: a new one.

    Raises:
        ConfigError: mlflow is not installed, the store cannot be opened, or the experiment is missing.
    """

    provider = "mlflow"

    def __init__(
        self,
        *,
        tracking_uri: str | None,
        experiment_name: str | None,
        create_experiment_if_not_exists: bool,
        run_name: str | None,
        resumed_id: str | None = None,
    ) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            remedy = "run: pip install 'tunesmith[mlflow]'"
            raise ConfigError("logger.provider", "mlflow is not installed", remedy) from error
        if tracking_uri is not None and urlsplit(tracking_uri).scheme in ("", "file"):
            # MLflow 3 wants this word before it writes to a folder. Naming a folder is asking for it,
            # and mlflow-skinny has no other local store.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            client = MlflowClient(tracking_uri=tracking_uri)
            if resumed_id is not None:
                run = client.get_run(resumed_id)
                client.update_run(resumed_id, status="RUNNING")
            else:
                wanted = experiment_name or "Default"
                experiment = _experiment(client, wanted, create_experiment_if_not_exists)
                run = client.create_run(experiment, run_name=run_name)
        except ConfigError:
            raise
        except Exception as error:  # MlflowException, or what the HTTP or database layer raises
            fault = (str(error).strip().splitlines() or [type(error).__name__])[0]
            remedy = "name a folder or the address of a server that runs"
            raise ConfigError(f"{_PLACE}.tracking_uri", fault, remedy) from error
        self.run_id: str = run.info.run_id
        self._named = run_name is not None
        self._status = "FAILED"  # until the run says how it ended
        self._trouble = Trouble("MLflow")
        self._deliveries = _Deliveries(client, self.run_id, self._trouble)
        self._closed = False

    def emit(self, event: Event) -> None:
        if self._closed:
            return
        with self._trouble.caught():
            if isinstance(event, RunStarted):
                self._deliveries.params(dict(_flat(plain(event.config))))
                if not self._named:
                    self._deliveries.name(event.run)
            elif isinstance(event, RunFinished):
                self._status = _STATUS.get(event.record.status, "FAILED")
            self._deliveries.metrics(scalars(event))

    def close(self) -> None:
        """Send what is waiting and end the run: as FAILED unless it reported another end."""
        if self._closed:
            return
        self._closed = True
        with self._trouble.caught():
            self._deliveries.close(self._status)


class _Deliveries:
    """Calls to MLflow, made in order by one thread. Those that fail are dropped with one warning.

    MLflow's client retries a request that fails for minutes; metrics gathered meanwhile go out
    together in the next one.
    """

    def __init__(self, client: Any, run_id: str, trouble: Trouble) -> None:
        self._client, self._run_id, self._trouble = client, run_id, trouble
        self._queue: queue.SimpleQueue[Callable[[], object] | list[Any]] = queue.SimpleQueue()
        self._done = False
        # A daemon: a server that hangs must not keep the process alive after close() gave up on it.
        self._thread = threading.Thread(target=self._deliver, name="mlflow-deliveries", daemon=True)
        self._thread.start()

    def metrics(self, points: list[Scalar]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        if points:
            self._queue.put([Metric(point.name, point.value, now, point.step) for point in points])

    def params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(_param_key(key), value) for key, value in values.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            part = params[start : start + _MAX_PARAMS]
            self._queue.put(partial(self._client.log_batch, self._run_id, params=part))

    def name(self, run_name: str) -> None:
        self._queue.put(partial(self._client.update_run, self._run_id, name=run_name))

    def close(self, status: str) -> None:
        self._queue.put(partial(self._end, status))
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._trouble.warn(f"did not answer for {_CLOSE_SECONDS:.0f} s at the end of the run")

    def _end(self, status: str) -> None:
        self._done = True
        self._client.set_terminated(self._run_id, status)

    def _deliver(self) -> None:
        while not self._done:
            item = self._queue.get()
            waiting: list[Any] = []
            while isinstance(item, list):
                waiting += item
                if len(waiting) >= _MAX_METRICS or self._queue.empty():
                    break
                item = self._queue.get()
            for start in range(0, len(waiting), _MAX_METRICS):
                with self._trouble.caught():
                    self._client.log_batch(self._run_id, metrics=waiting[start : start + _MAX_METRICS])
            if not isinstance(item, list):
                with self._trouble.caught():
                    item()


def _experiment(client: Any, name: str, create: bool) -> str:
    """The id of the active experiment ``name``."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None and create:
        return str(client.create_experiment(name))
    if experiment is None or experiment.lifecycle_stage != "active":
        fault = (
            f"there is no experiment {name!r}" if experiment is None else f"experiment {name!r} is deleted"
        )
        remedy = "set create_experiment_if_not_exists: true" if experiment is None else "restore or rename it"
        raise ConfigError(f"{_PLACE}.experiment_name", fault, remedy)
    return str(experiment.experiment_id)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names, as MLflow's parameters are flat; lists stay one value."""
    if isinstance(value, Mapping) and (value or not prefix):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, str(value)


def _param_key(key: str) -> str:
    """``key`` in the characters MLflow allows; a slash would make folders of it."""
    return re.sub(r"[^\w\-. :]", "_", key)[:250]
