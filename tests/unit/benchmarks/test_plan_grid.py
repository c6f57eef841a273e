"""The grid of plans beside runs: what is compared, and how it is shown."""

import importlib
import sys
from pathlib import Path

import pytest

from tiny_models import save_tiny_model

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
CELL = {"model": "m", "method": "lora", "checkpointing": False, "length": 96}


@pytest.fixture(scope="module")
def grid():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("plan_grid")
    sys.path.remove(str(BENCHMARKS))
    for name in ("plan_grid", "memory_grid"):
        del sys.modules[name]


@pytest.fixture
def plan():
    here = {"total": 1_100, "seconds": 9.0}
    return {
        "methods": {"lora": {"machines": [here, {"total": 5, "seconds": 5.0}]}, "full": {"machines": [{}]}},
        "probe": {"steps": 3, "real_tokens": 300, "cpu_seconds": 1.5, "taken_by_others": 0.25},
        "workload": {"tokens": 1_000},
    }


def test_ratios_are_foretold_over_measured(grid, plan):
    found = grid.compared(plan, "lora", 1_000, [(4.0, 1.0, 0.1), (6.0, 3.0, 0.3)])
    assert found["bytes_ratio"] == pytest.approx(1.1)
    assert found["seconds_ratio"] == pytest.approx(0.9)
    # 1.5 s for 300 tokens are 5 s for 1,000; the run took 4.
    assert found["cpu_seconds_ratio"] == pytest.approx(1.25)
    assert (found["others_in_probe"], found["others_in_run"]) == (0.25, pytest.approx(0.2))


def test_a_line_a_cell_and_how_far_they_reach(grid, plan):
    cells = [CELL | grid.compared(plan, "lora", peak, [(9.0, 5.0, 0.0)]) for peak in (1_000, 1_250)]
    text = grid.table(cells)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 4
    assert "| 1, 3 | 0.00, 0.00 GB | 1.100 | 9.0, 9.0 s | 1.00 | 5.0, 5.0 s | 1.00 | 25%, 0% |" in rows[2]
    assert "memory 0.880 to 1.100; wall time 1.000 to 1.000; CPU time 1.000 to 1.000." in text


@pytest.mark.flow
def test_a_cell_is_planned_and_trained(grid, tmp_path):
    found = grid.cell(str(save_tiny_model(tmp_path / "m")), "full", True, 24, 5)
    assert (found["model"], found["method"], found["checkpointing"], found["steps"]) == ("m", "full", True, 5)
    assert found["bytes_ratio"] == pytest.approx(1, abs=0.1)
    assert found["measured_seconds"] > 0
    assert found["measured_cpu_seconds"] > 0
