"""Measurements in a process of their own: one that fails, and one that is stopped."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest

from tunesmith.comparison import forgetting, measure
from tunesmith.comparison.record import Forgetting, Serving
from tunesmith.errors import NonFiniteError


def test_a_checkpoint_that_cannot_be_measured_keeps_none_of_the_others_from_it(tmp_path, monkeypatch):
    def measured(checkpoint, _before, *, arm, seed, files):
        if "bad" in checkpoint:
            raise NonFiniteError("bad", "a loss is not finite", "use another")
        return (Forgetting(arm, seed, "shipped", 1, 1.0, 2.0, None, None, None),)

    monkeypatch.setattr(forgetting, "measure_general", lambda *_, **__: ())
    monkeypatch.setattr(forgetting, "measure_forgetting", measured)
    runs = [(str(tmp_path / name), "full", seed) for seed, name in enumerate(["bad", "good"])]
    with pytest.raises(NonFiniteError):
        measure.carry_out("forgetting", {"base": "b", "runs": runs, "files": []})
    (found,) = measure.read_forgetting(tmp_path / "good", [])
    assert (found.seed, found.general_loss_after) == (1, 2.0)
    assert measure.read_forgetting(tmp_path / "bad", []) is None


@pytest.mark.parametrize(
    "changed", [{"load_seconds": "x"}, {"swap_seconds": True}, {"merged_tokens_per_second": [1]}, {"more": 1}]
)
def test_a_measurement_that_is_damaged_counts_as_none(tmp_path, changed):
    good = Serving(1.5, 0.5, 100, 10.0, None)
    (tmp_path / measure.SERVING).write_text(json.dumps(asdict(good)))
    assert measure.read_serving(tmp_path) == good
    (tmp_path / measure.SERVING).write_text(json.dumps(asdict(good) | changed))
    assert measure.read_serving(tmp_path) is None


def test_a_measurement_that_is_stopped_leaves_no_temporary_model(tmp_path):
    program = """
import os, runpy, shutil, sys, time
from types import SimpleNamespace
remove = shutil.rmtree
# By os.write and not print: a signal may come while that flushes.
def remove_slowly(*arguments, **named):
    os.write(1, b"removing\\n")
    time.sleep(0.2)  # the second signal comes now
    remove(*arguments, **named)
shutil.rmtree = remove_slowly
import tempfile  # after that: some releases of Python take the function itself
def hold(*_a, **_k):
    with tempfile.TemporaryDirectory():
        os.write(1, b"ready\\n")
        time.sleep(30)
sys.modules["tunesmith.models.base"] = SimpleNamespace(BaseFolder=None, find_base=hold)
sys.modules["tunesmith.serving.engine"] = SimpleNamespace(CpuEngine=None, EngineSettings=lambda **_: None)
sys.argv = ["measure", sys.argv[1]]
runpy.run_module("tunesmith.comparison.measure", run_name="__main__")
"""
    order = {"kind": "serving", "order": {"checkpoint": str(tmp_path / "run"), "base": "b", "output": "o"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_config.json").write_text("{}")
    (tmp_path / "order.json").write_text(json.dumps(order))
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "order.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "removing\n", process.wait(timeout=60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert list((tmp_path / "temporary").iterdir()) == []
