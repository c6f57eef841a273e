"""``tunesmith compare`` from end to end on a tiny model: reports, continuing, what is refused."""

import json
import signal
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from flow_parts import LORA, refused, settings_for, start, write_config
from tunesmith.cli import main
from tunesmith.comparison import child, measure, trials
from tunesmith.comparison.record import read_comparison
from tunesmith.evaluation.heldout_file import read_heldout

pytestmark = pytest.mark.flow
_RUN_CHILD = trials._run_child


def in_this_process(monkeypatch: pytest.MonkeyPatch, *, real: str = "") -> None:
    """Spare a comparison the start of its children: what they do is done here; ``real`` names a kind that stays one."""

    def stand_in(command: list[str], folder: Path, environment: Any, on_step: Any) -> int:
        module, file = command[2], Path(command[3])
        order = json.loads(file.read_text()) if module.endswith("measure") else None
        if order and order["kind"] == real:
            return _RUN_CHILD(command, folder, environment, on_step)
        with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            if order is None:
                return child.carry_out(file)
            measure.carry_out(order["kind"], order["order"])
        return 0

    monkeypatch.setattr(trials, "_run_child", stand_in)


def ended(folder: Path) -> dict[str, int]:
    """When each training of a comparison ended."""
    return {str(file): file.stat().st_mtime_ns for file in folder.glob("runs/*/*/report.json")}


def test_a_comparison_and_its_continuation(tmp_path, tiny, rows, capfd, monkeypatch):
    in_this_process(monkeypatch)
    settings = settings_for(
        tmp_path, tiny, rows, lora_config=LORA, optimizer={"max_grad_norm": 0.0},
        evaluation={"metric": "token_f1", "max_new_tokens": 6},
    )  # fmt: skip
    config = write_config(tmp_path / "mine.yaml", settings)
    # At 1e30 the weights do not stay finite, which is a result too; a single rate is not swept for.
    rates = ["--learning-rates", "full=1e-3,1e30", "--learning-rates", "lora=1e-2"]
    command = ["compare", str(config), "--price-per-hour", "3.6", *rates]
    assert main([*command, "--seeds", "1"]) == 0, capfd.readouterr().err
    folder = tmp_path / "outputs" / "compare-mine"
    record = read_comparison(folder)
    assert record.status == "finished"
    assert [arm.name for arm in record.arms] == ["full", "lora"]
    assert record.runs_done == 4
    low, high = record.sweep
    assert (low.learning_rate, low.kept, high.learning_rate, high.kept) == (1e-3, True, 1e30, False)
    assert (low.steps, high.eval_loss) == (3, None)
    (failed,) = [run for run in record.runs if run.status == "failed"]
    assert "not finite" in failed.fault
    assert any("one seed" in note for note in record.notes)
    assert any("also chose" in note for note in record.notes)
    for summary in record.summaries:
        (run,) = [run for run in record.runs if run.purpose == "final" and run.arm == summary.arm]
        assert run.seed == 42
        values = read_heldout(folder / run.folder / "heldout.json")
        assert len(values.losses) == 6
        assert sum(values.losses) / sum(values.tokens) == pytest.approx(run.eval_loss, rel=1e-6)
        assert sum(values.values) / 6 == pytest.approx(run.metric_value)
        assert summary.eval_loss.value == pytest.approx(run.eval_loss, rel=1e-6)
        assert summary.metric.value == pytest.approx(run.metric_value)
        # 3.6 an hour is a thousandth a second.
        assert summary.training_cost == pytest.approx(summary.wall_seconds / 1000)
        assert summary.serving.merged_tokens_per_second > 0
        assert not (folder / run.folder / "checkpoints").exists()
    full, lora = record.summaries
    assert lora.serving.unmerged_tokens_per_second > 0
    assert full.serving.unmerged_tokens_per_second is None
    assert full.trainable_parameters > lora.trainable_parameters
    assert (folder / "adapters" / "lora_fine_tuning" / "lora-seed42" / "adapter_config.json").is_file()
    assert record.base.metric is not None
    assert [d.measure for d in record.differences] == ["token_f1", "eval_loss"]
    assert {(f.arm, f.seed) for f in record.forgetting} == {("full", 42), ("lora", 42)}
    assert {arm for sample in record.samples for arm in sample.answers} == {"full", "lora"}
    assert record.verdict.headline in (folder / "report.md").read_text().replace("\\", "")
    assert "<html" in (folder / "report.html").read_text()

    # A further seed is trained alone; nothing is trained twice, not even what failed.
    before = ended(folder)
    in_this_process(monkeypatch, real="forgetting")
    capfd.readouterr()
    assert main([*command, "--seeds", "2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["runs_done"] == 6
    after = ended(folder)
    assert {name: after[name] for name in before} == before
    # Of two kinds: the failed training left a report too, which says so.
    assert len(after) == len(before) + 2 == 6
    assert read_comparison(folder).summaries[1].seeds == (42, 43)


def _stopped(command: list[str], folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Start a comparison, and stop it once the first training has saved further checkpoints."""
    process: subprocess.Popen[str] = start(*command)
    seen = set(folder.glob("runs/full-*/*/checkpoints/step-*"))
    deadline = time.monotonic() + 120
    while not set(folder.glob("runs/full-*/*/checkpoints/step-*")) - seen:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def test_an_interrupted_comparison_goes_on(tmp_path, tiny, rows, monkeypatch):
    schedule = {"unit": "steps", "frequency": 20}
    settings = settings_for(tmp_path, tiny, rows, num_epochs=60, checkpoint_and_evaluation_frequency=schedule)
    config, folder = write_config(tmp_path / "mine.yaml", settings), tmp_path / "mine"
    rates = ["--learning-rates", "full=1e-3", "--learning-rates", "lora=1e-2"]
    command = ["compare", str(config), "--seeds", "1", "-o", str(folder), *rates]
    code, err = _stopped(command, folder, signal.SIGINT)
    assert code == 130
    assert err.startswith("Stopped: ")
    assert len(err.splitlines()) == 1
    assert read_comparison(folder).status == "interrupted"
    # Killed, the comparison cannot tell its child to stop; the child notices, and what follows waits for it.
    assert _stopped(command, folder, signal.SIGKILL)[0] == -signal.SIGKILL
    in_this_process(monkeypatch)
    assert main(command) == 0
    (report,) = folder.glob("runs/full-*/*/report.json")
    first, second = json.loads(report.read_text())["resumed_at"]
    assert 0 < first < second
    record = read_comparison(folder)
    assert record.status == "finished"
    assert [run.steps for run in record.runs] == [180, 180]
    assert {entry.arm for entry in record.forgetting} == {"full", "lora"}
    assert len(ended(folder)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "full,loar"], "closest is lora"),
        (["--arms", "full"], "fewer than two arms"),
        (["--arms", "full,lora:targets=q_prj"], "closest is q_proj"),
        (["--arms", "full,lora:r=0"], "--arms lora:r=0: PEFT cannot apply"),
        (["--arms", "full,lora:alpha=large"], "--arms lora:alpha=large: PEFT cannot apply"),
        (["--learning-rates", "lora=fast"], "'fast' is no rate"),
        (["--learning-rates", "mine=1e-3"], "no arm 'mine'"),
        (["--set", "valid_path=null"], "valid_path"),
        (["--forgetting", "no such text.jsonl"], "no such text.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_trained(
    tmp_path, tiny, rows, capfd, arguments, said
):
    config = write_config(tmp_path / "mine.yaml", settings_for(tmp_path, tiny, rows))
    assert said in refused(capfd, ["compare", str(config), *arguments])
    assert not (tmp_path / "outputs").exists()
