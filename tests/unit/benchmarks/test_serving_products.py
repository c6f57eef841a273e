"""The table of serving's products and steps: medians, in units that are told."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("serving_products")
    sys.path.remove(str(BENCHMARKS))


def test_the_table_has_medians_in_gflops_and_milliseconds(benchmark):
    # 16 rows by 3072 x 576 are 56,623,104 operations: in 1 ms 57 GFLOP/s, in half of one 113.
    told = benchmark.table({
        "date": "2026-11-29", "rounds": 3, "machine": {"processor": "P", "torch_threads": 2},
        "products": {"16": {"a": [0.001, 9.0, 0.0001], "b": [0.0005] * 3}},
        "steps": {"1": {"a": [0.0102, 0.0098, 0.5]}},
    })  # fmt: skip
    assert "| rows, GFLOP/s | a | b |\n|---|---|---|\n| 16 | 57 | 113 |" in told
    assert "| requests, ms | a |\n|---|---|\n| 1 | 10.2 |" in told


def test_weights_are_drawn_in_the_bits_they_are_named_by(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "LAYERS", 1)
    monkeypatch.setattr(benchmark, "COLUMNS", 32)
    for bits, most in ((4, 16), (8, 255)):
        blocks = benchmark.weights(bits)[0].reshape(-1, 32)
        assert max(len(block.unique()) for block in blocks) <= most
