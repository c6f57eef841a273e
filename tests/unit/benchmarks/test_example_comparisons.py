"""The example comparisons: slices, settings, and results that hold no row and no answer."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from comparison_records import record
from machine_paths import places_in
from tunesmith.comparison.markdown import comparison_markdown
from tunesmith.comparison.record import from_json, read_comparison, to_json
from tunesmith.config.load import load_config

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
SHIPPED = sorted((BENCHMARKS / "results" / "comparisons").glob("*.json"))


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("example_comparisons")
    sys.path.remove(str(BENCHMARKS))
    del sys.modules["example_comparisons"]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{split} {n} é"},
                    {"role": "assistant", "content": "f(a[b])"},
                ]
            }
            for n in range(9)
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def small(module, **changes):
    fields = {
        "train": 5,
        "valid": 3,
        "test": 4,
        "metric": "record_match",
        "answered": 2,
        "max_new_tokens": 8,
        "sweep_budget": 1.0,
    }
    return module.Example(**{**fields, **changes})


def test_slices_are_the_first_rows_as_they_stand(module, data, tmp_path):
    module.write_slices(small(module), data, tmp_path)
    for split, count in (("train", 5), ("valid", 3), ("test", 4)):
        whole = (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines() == whole[:count]


def test_what_is_missing_is_said(module, data, tmp_path):
    with pytest.raises(SystemExit, match=r"train\.jsonl: has 9 rows, 10 are wanted; give --train"):
        module.write_slices(small(module, train=10), data, tmp_path)
    (data / "test.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"test\.jsonl: is missing"):
        module.write_slices(small(module), data, tmp_path)


@pytest.mark.parametrize("name", ["banking77", "sql", "viggo", "gsm8k"])
def test_the_settings_load(module, tmp_path, name):
    file = tmp_path / "example.yaml"
    file.write_text(module.settings(module.EXAMPLES[name], 7), encoding="utf-8")
    config = load_config(str(file)).config
    assert (config.optimization.seed, config.checkpoints.evaluation.max_rows) == (
        7,
        module.EXAMPLES[name].answered,
    )
    assert module.EXAMPLES[name].answered <= module.EXAMPLES[name].test


def test_results_hold_no_row_no_answer_and_no_curve_of_a_sweep(module, tmp_path):
    before = record()
    assert before.samples
    report = tmp_path / "report.json"
    report.write_text(to_json(before), encoding="utf-8")
    module.copy_results(report, tmp_path / "results", "viggo", "one thread")
    text = (tmp_path / "results" / "viggo.json").read_text(encoding="utf-8")
    after = from_json(text)
    assert (after.name, after.samples, after.notes) == ("viggo", (), (*before.notes, "one thread"))
    assert all(run.train_curve == () for run in after.runs if run.purpose == "sweep")
    assert [r.train_curve for r in after.runs if r.purpose == "final"] == [
        r.train_curve for r in before.runs if r.purpose == "final"
    ]
    page = (tmp_path / "results" / "viggo.md").read_text(encoding="utf-8")
    assert "Dirt: Showdown" not in text + page
    assert (after.summaries, after.differences, after.verdict) == (
        before.summaries,
        before.differences,
        before.verdict,
    )


def test_the_command_is_given_what_was_asked_for(module, data, tmp_path, monkeypatch):
    asked = []

    def compare(scratch, output, options):
        asked.extend([scratch, output, *options])
        (scratch / output).mkdir()
        (scratch / output / "report.json").write_text(to_json(record()), encoding="utf-8")
        return 0

    monkeypatch.setattr(module, "compare", compare)
    sizes = [
        "--train",
        "5",
        "--valid",
        "3",
        "--test",
        "4",
        "--answered",
        "4",
        "--seeds",
        "1",
        "--sweep-budget",
        "2",
    ]
    places = ["--scratch", str(tmp_path / "s"), "--results", str(tmp_path / "r"), "--name", "mine"]
    arms = ["--arms", "lora,lora:r=4", "--rates", "lora=1e-3,1e-2", "lora:r=4=1e-3"]
    assert module.main(["sql", str(data), *sizes, *places, *arms]) == 0
    assert asked == [
        tmp_path / "s", "compare-sql", "--arms", "lora,lora:r=4", "--seeds", "1", "--sweep-budget", "2.0",
        "--learning-rates", "lora=1e-3,1e-2", "--learning-rates", "lora:r=4=1e-3",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["mine.json", "mine.md"]


def test_a_stopped_comparison_leaves_no_results(module, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "compare", lambda *_: 130)
    sizes = ["--train", "5", "--valid", "3", "--test", "4", "--answered", "4"]
    places = ["--scratch", str(tmp_path / "s"), "--results", str(tmp_path / "r")]
    assert module.main(["sql", str(data), *sizes, *places]) == 130
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_results_are_finished_small_and_without_data(file):
    found = read_comparison(file)
    assert (found.status, found.name, found.samples) == ("finished", file.stem, ())
    assert file.stat().st_size < 200_000
    assert file.with_suffix(".md").read_text(encoding="utf-8") == comparison_markdown(found)
    text = file.read_text(encoding="utf-8")
    assert places_in(text) == []
    assert "\\\\" not in text
    assert "messages" not in text
