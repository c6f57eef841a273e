"""docs/lora-or-full.ipynb runs and gives what is stored in it; the guide's tables are those of the shipped results."""

import importlib
import sys
from pathlib import Path

import pytest

from comparison_records import record
from machine_paths import places_in
from notebook_cells import code_cells, execute, read_notebook, stored

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "lora-or-full.ipynb"
GUIDE = ROOT / "docs" / "lora-or-full.md"


@pytest.fixture(scope="module")
def outputs():
    return execute(NOTEBOOK)


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("comparison_tables")
    sys.path.remove(str(ROOT / "benchmarks"))
    del sys.modules["comparison_tables"]


def test_the_notebook_runs_and_gives_what_is_stored_in_it(outputs):
    kept = [stored(cell) for cell in code_cells(read_notebook(NOTEBOOK))]
    assert [output.text for output in outputs] == [output.text for output in kept]
    assert [len(output.figures) for output in outputs] == [len(output.figures) for output in kept]
    assert sum(len(output.figures) for output in outputs) == 3
    figures = [figure for output in kept for figure in output.figures]
    assert all(figure.startswith(b"\x89PNG") for figure in figures)


def test_the_notebook_is_small_ran_in_order_and_names_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert places_in(text) == []
    cells = code_cells(read_notebook(NOTEBOOK))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert read_notebook(NOTEBOOK)["nbformat"] == 4


def test_the_guide_shows_the_results_that_are_shipped(tables):
    text = GUIDE.read_text(encoding="utf-8")
    assert "<!-- results -->\n" in text
    assert tables.with_tables(text) == text, "run python benchmarks/comparison_tables.py"


def test_a_row_of_each_table(tables):
    two = record(arms=record().arms[:2], summaries=record().summaries[:2], lineage={
        "data": {split: {"rows": rows} for split, rows in (("train", 5096), ("valid", 714), ("test", 541))}
    })  # fmt: skip
    text = tables.tables([two])
    assert "| compare-viggo | 5096, 714, 541 | 320 | 1e-05, 0.0001 | 3 |" in text
    metric = "2.1 [1.2, 3.7] | 81.2 [77.9, 84.2] | 80.4 [77.1, 83.4] | +0.8 [-1.9, +3.4] | none shown |"
    assert f"| compare-viggo | record_match | {metric}" in text
    loss = "2.413 | 0.114 [0.102, 0.127] | 0.117 [0.105, 0.130] | -0.003 [-0.006, -0.000] | full-parameter |"
    assert f"| compare-viggo | {loss}" in text
    costs = "1.27 GiB | 2,442,240 | 9.3 MiB | 0.02 s | +0.050 and +0.060 and +0.070 | 67 %, 63 % and 63 % and 63 % |"
    assert f"| compare-viggo | LoRA | {costs}" in text
    assert "Not finished, so not shown: banking77, sql, viggo, gsm8k." in text
