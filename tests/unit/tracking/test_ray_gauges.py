"""The sink for Ray's gauges where there is no Ray; with it: tests/unit/cluster/test_ray_metrics.py."""

import sys
from types import SimpleNamespace

from tunesmith.tracking.ray_gauges import RayGauges


def test_without_a_cluster_nothing_is_set_and_nothing_said(monkeypatch, events, caplog):
    for ray in (None, SimpleNamespace(is_initialized=lambda: False)):  # of which no gauge could be made
        monkeypatch.setitem(sys.modules, "ray", ray)
        sink = RayGauges()
        for event in events:
            sink.emit(event)
        sink.close()
    assert caplog.records == []


def test_trouble_with_ray_is_said_once_and_stops_nothing(monkeypatch, events, caplog):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "ray.util", None)
    monkeypatch.setitem(sys.modules, "ray.util.metrics", None)
    sink = RayGauges()
    for event in events:
        sink.emit(event)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Ray's metrics: ")
    assert said.endswith("training goes on, values may be missing there")
