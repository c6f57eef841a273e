"""Events to the gauges of Ray, which its dashboard and its metrics endpoint show."""

import sys
from typing import Any

from tunesmith.tracking.events import Event, RunStarted
from tunesmith.tracking.scalars import scalars
from tunesmith.tracking.trouble import Trouble


class RayGauges:
    """Sets the gauge ``tunesmith_NAME`` for each metric, with the run's name as its tag ``run``.

    Ray itself puts ``ray_`` before the name. In a process that is no part of a Ray cluster nothing is set.
    """

    def __init__(self) -> None:
        self._trouble = Trouble("Ray's metrics")
        self._gauges: dict[str, Any] = {}
        self._tags = {"run": ""}

    def emit(self, event: Event) -> None:
        with self._trouble.caught():
            if isinstance(event, RunStarted):
                self._tags = {"run": event.run}
            points = scalars(event)
            if points and _is_on_ray():
                for point in points:
                    self._gauge(point.name).set(point.value, tags=self._tags)

    def close(self) -> None:
        """Ray drops what a process has set when that ends."""

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[name] = Gauge(
                f"tunesmith_{name}", description=f"{name} of a run of tunesmith", tag_keys=("run",)
            )
        return self._gauges[name]


def _is_on_ray() -> bool:
    ray = sys.modules.get("ray")  # where it is not loaded, no cluster has been joined
    return ray is not None and bool(ray.is_initialized())
