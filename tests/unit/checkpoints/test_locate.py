import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith.checkpoints import locate
from tunesmith.checkpoints.listing import print_runs
from tunesmith.checkpoints.locate import list_runs, locate_model
from tunesmith.checkpoints.manifest import MANIFEST_NAME
from tunesmith.checkpoints.store import CheckpointStore
from tunesmith.errors import ModelError


@pytest.fixture
def train(tmp_path, tools):
    """Leave the files of a run whose checkpoints of steps 1, 2, … have these losses."""

    def run(
        name,
        losses,
        *,
        tag=None,
        report=None,
        publish=True,
        day=1,
        output="outputs",
        mark="adapter_config.json",
    ):
        run_dir = tmp_path / output / name
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text("model_id: org/tiny\n")
        store = CheckpointStore(run_dir, keep=1, fs=tools.unflushed)
        for step, loss in enumerate(losses, start=1):
            store.save(
                step,
                lambda folder: (folder / mark).write_text("{}"),
                lambda files, step=step, loss=loss: tools.manifest(
                    files,
                    step=step,
                    eval_loss=loss,
                    tag=tag or f"{name}-tag",
                    run=name,
                    created=f"2026-01-{day:02d}T00:00:{step:02d}+00:00",
                ),
                loss,
            )
        if losses and publish:
            store.publish_best()
        if report is not None:
            (run_dir / "report.json").write_text(json.dumps(report))
        return run_dir

    return run


@pytest.fixture
def outputs(tmp_path):
    return [tmp_path / "outputs"]


def test_a_run_means_its_best_by_folder_name_or_tag(train, outputs):
    run = train("one", [1.0, 2.0], tag="org/tiny:alice:abcde")
    train("two", [1.0])
    for reference in (str(run), "one", "org/tiny:alice:abcde"):
        assert locate_model(reference, outputs) == run / "best"


def test_a_tag_is_read_from_the_report_too(train, outputs):
    run = train("one", [1.0], tag="in-manifest", report={"tag": "in-report"})
    assert locate_model("in-report", outputs) == run / "best"


def test_a_run_that_goes_on_means_its_newest_checkpoint(train, outputs):
    run = train("one", [1.0, 2.0, 3.0], publish=False)
    newest = run / "checkpoints" / "step-000003"
    assert locate_model(str(run), outputs) == newest
    assert locate_model("one-tag", outputs) == newest


@pytest.mark.parametrize("mark", ["adapter_config.json", "config.json"])
def test_a_checkpoint_folder_means_itself(train, mark):
    run = train("one", [1.0, 2.0], mark=mark)
    folder = run / "checkpoints" / "step-000002"
    assert locate_model(str(folder), []) == folder


def test_relative_folders_are_found_from_the_current_one(train, tmp_path, monkeypatch):
    run = train("one", [1.0])
    monkeypatch.chdir(tmp_path)
    assert locate_model("outputs/one", []).resolve() == run / "best"


@pytest.mark.parametrize(
    "reference", ["org/base", "smollm2-135m-instruct-q4", "", "x" * 5000, "a\0b", "~nobody-here/x", "one-ta"]
)
def test_anything_else_is_a_base_model(train, outputs, tmp_path, monkeypatch, reference):
    train("one", [1.0])
    empty = tmp_path / "cwd"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert locate_model(reference, [*outputs, tmp_path / "no such folder"]) is None


def test_a_base_model_folder_in_the_current_one_does_not_hide_a_tag(train, outputs, tmp_path, monkeypatch):
    run = train("one", [1.0])
    (tmp_path / "one").mkdir()  # an ordinary folder that happens to bear the run's name
    monkeypatch.chdir(tmp_path)
    assert locate_model("one", outputs) == run / "best"


def test_several_runs_of_one_tag_are_not_guessed_between(train, outputs):
    first, second = train("one", [1.0], tag="mine"), train("two", [1.0], tag="mine")
    with pytest.raises(ModelError, match="means 2 runs") as caught:
        locate_model("mine", outputs)
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)
    assert "give the folder" in caught.value.remedy


def test_the_same_output_folder_named_twice_is_no_ambiguity(train, outputs):
    run = train("one", [1.0])
    assert locate_model("one", [*outputs, outputs[0] / ".." / "outputs"]) == run / "best"


def test_a_run_that_failed_before_its_first_checkpoint_gives_way(train, outputs):
    train("failed", [], report={"tag": "mine", "status": "failed"})
    run = train("again", [1.0], tag="mine")
    assert locate_model("mine", outputs) == run / "best"


def test_a_run_without_checkpoint_is_an_error_not_a_base_model(train, outputs):
    run = train("one", [])
    for reference in ("one", str(run)):
        with pytest.raises(ModelError, match=r"one: this run has no checkpoint yet; \w"):
            locate_model(reference, outputs)


def test_runs_are_listed_newest_first_with_their_facts(train, outputs):
    report = {"tag": "t", "model_id": "org/tiny", "method": "lora", "eval_loss": 9.0, "status": "finished"}
    finished = train("finished", [3.0, 2.0, 2.5], day=2, report=report)
    going = train("going", [1.5], day=3, publish=False)
    (outputs[0] / "lora_fine_tuning" / "t").mkdir(parents=True)
    (outputs[0] / "loose.txt").write_text("x")
    (outputs[0] / ".going.tmp-1-00000001" / "checkpoints").mkdir(parents=True)
    first, second = list_runs(outputs)
    assert (first.path, first.status, first.best_loss, first.created) == (
        going,
        "unfinished",
        1.5,
        "2026-01-03T00:00:01+00:00",
    )
    assert (second.path, second.status, second.best_loss) == (finished, "finished", 2.0)
    assert (second.tag, second.model_id, second.method, second.bytes) == (
        "finished-tag",
        "org/tiny",
        "lora",
        2,
    )


def test_names_in_a_list_do_not_steer_the_terminal(train, outputs):
    train("one", [], report={"tag": "a\x1b[2J\nb", "model_id": "m\x1b", "status": "failed\x1b"})
    file = io.StringIO()
    print_runs(Console(file=file, width=200), list_runs(outputs), outputs)
    assert "\x1b" not in file.getvalue()
    assert "a\\x1b[2J\\nb" in file.getvalue()


def test_an_entry_that_cannot_be_looked_at_hides_no_other(train, outputs, monkeypatch):
    train("a", [1.0])
    train("b", [1.0])
    real = Path.is_dir

    def stale(path, *arguments):
        if path.name == "a":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, *arguments)

    monkeypatch.setattr(Path, "is_dir", stale)
    assert [run.path.name for run in list_runs(outputs)] == ["b"]


def test_a_run_that_is_removed_while_it_is_listed_is_no_traceback(train, outputs, monkeypatch):
    run = train("one", [])
    real = locate._report

    def removed(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return real(folder)

    monkeypatch.setattr(locate, "_report", removed)
    assert [(item.path, item.status) for item in list_runs(outputs)] == [(run, "unfinished")]


def test_a_failed_run_is_listed_with_what_its_report_tells(train, outputs):
    run = train(
        "one",
        [],
        report={"tag": "t", "model_id": "m", "method": "full", "status": "failed", "eval_loss": None},
    )
    os.utime(run / "report.json", (86400, 86400))
    (listing,) = list_runs(outputs)
    assert (listing.tag, listing.model_id, listing.method, listing.status) == ("t", "m", "full", "failed")
    assert (listing.best_loss, listing.bytes) == (None, None)
    assert listing.created == "1970-01-02T00:00:00+00:00"


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "report.json").write_text("{"),
        lambda run: (run / "report.json").write_bytes(b"\xff\xfe"),
        lambda run: (run / "report.json").write_text("[]"),
        lambda run: (run / "best" / MANIFEST_NAME).write_text("{}"),
        lambda run: (run / "best" / MANIFEST_NAME).unlink(),
        lambda run: (run / "best" / "adapter_config.json").unlink(),
        lambda run: (run / "best" / "adapter_config.json").write_text("longer than it was"),
    ],
)
def test_damaged_runs_are_listed_as_such_beside_the_good(train, outputs, damage):
    bad = train("bad", [1.0], day=2)
    train("good", [1.0], report={"status": "finished"})
    damage(bad)
    assert {item.path.name: item.status for item in list_runs(outputs)} == {
        "bad": "damaged",
        "good": "finished",
    }


def test_a_run_with_only_damaged_checkpoints_is_damaged(train, outputs):
    run = train("one", [1.0], publish=False)
    (run / "checkpoints" / "step-000001" / MANIFEST_NAME).unlink()
    assert [item.status for item in list_runs(outputs)] == ["damaged"]


def test_a_finished_run_without_its_model_is_damaged(train, outputs):
    train("one", [], report={"status": "finished"})
    assert [item.status for item in list_runs(outputs)] == ["damaged"]


def test_a_run_that_may_not_be_looked_into_is_shown_and_hides_no_other(as_ordinary_user):
    for name, mode in (("a-closed", 0o700), ("b-open", 0o755)):
        (as_ordinary_user / name / "checkpoints").mkdir(parents=True)
        (as_ordinary_user / name).chmod(mode)
    os.seteuid(65534)
    listed = {item.path.name: item.status for item in list_runs([as_ordinary_user])}
    assert listed == {"a-closed": "damaged", "b-open": "unfinished"}
    assert locate_model("org/base", [as_ordinary_user]) is None
    with pytest.raises(ModelError, match="cannot be read"):
        locate_model("a-closed", [as_ordinary_user])


def test_no_runs(tmp_path):
    assert list_runs([tmp_path, tmp_path / "no such folder"]) == []
