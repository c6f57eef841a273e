"""Going on with a run whose files, base or neighbours were changed meanwhile: to the same bits, or not at all."""

import json
import shutil
from pathlib import Path

import pytest

import tunesmith.run
import tunesmith.run_open
from flow_parts import LORA, refused, report
from resume_parts import interrupted, made
from tunesmith import native
from tunesmith.checkpoints.lock import is_locked
from tunesmith.checkpoints.manifest import read_manifest
from tunesmith.checkpoints.store import CheckpointStore
from tunesmith.cli import main

pytestmark = pytest.mark.flow


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def resume(capfd, config: Path, run: str) -> str:
    """What a resumed run says, which must finish."""
    capfd.readouterr()
    code = main(["finetune", str(config), "--resume", run])
    out, err = capfd.readouterr()
    assert code == 0, err
    return out.replace("\n", "")


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json"])
def test_other_tokens_of_the_same_text_are_refused(tmp_path, tiny, rows, monkeypatch, capfd, file):
    model = shutil.copytree(tiny, tmp_path / "model")
    config, run = interrupted(tmp_path, model, rows, monkeypatch, 2, lora_config=LORA)
    path = model / file
    if file == "tokenizer.json":
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["merges"].pop()
        path.write_text(json.dumps(tokenizer))
    else:
        path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> ", 1))
    err = refused(capfd, ["finetune", str(config), "--resume", str(run)])
    assert "tokenizer and chat template: " in err


def test_other_rows_to_score_are_refused_and_by_force_not_laid_beside_old_answers(
    tmp_path, tiny, rows, monkeypatch, capfd
):
    test = tmp_path / "test.jsonl"
    shutil.copy(rows / "valid.jsonl", test)
    evaluation = {"metric": "token_f1", "max_new_tokens": 3, "test_path": str(test)}
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA, evaluation=evaluation)
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:4]))
    assert "test data: SHA-256" in refused(capfd, ["finetune", str(config), "--resume", str(run)])
    assert main(["finetune", str(config), "--resume", str(run), "--force-resume"]) == 0
    assert [sample["before"] for sample in report(run)["samples"]] == [None] * 3
    assert "test data" in report(run)["forced"][0]


def test_other_instructions_of_the_processor_are_refused(tmp_path, tiny, rows, monkeypatch, capfd):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    assert read_manifest(run / "checkpoints" / "step-000002").environment["blas"]
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    err = refused(capfd, ["finetune", str(config), "--resume", str(run)])
    assert "blas: " in err
    assert "MKL_CBWR=COMPATIBLE now" in err


def test_kernels_that_were_compiled_otherwise_are_refused(tmp_path, tiny, rows, monkeypatch, capfd):
    if not native.is_compiled("training"):
        pytest.skip("no C compiler was at hand when tunesmith was installed")
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    assert read_manifest(run / "checkpoints" / "step-000002").environment["kernels"].startswith("C, ")
    monkeypatch.setattr(native, "_library", lambda _name: None)
    monkeypatch.setattr(native, "_function", lambda *_: None)
    err = refused(capfd, ["finetune", str(config), "--resume", str(run)])
    assert "kernels: C, " in err
    assert "torch now" in err


@pytest.mark.parametrize(
    "line",
    ["5", "null", "[]", "{", "\xff", "[" * 100_000, '{"event": "step", "step": "x"}', '{"step": null}'],
)
def test_metrics_that_are_none_are_refused_before_a_step_is_done(
    tmp_path, tiny, rows, monkeypatch, capfd, line
):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    file = run / "metrics.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + line.encode("latin-1") + b"\n" + b"".join(rest))
    monkeypatch.setattr(tunesmith.run, "steps_after", lambda *_: pytest.fail("no step may be done"))
    err = refused(capfd, ["finetune", str(config), "--resume", str(run)])
    assert "metrics.jsonl line 2: is not an event" in err


@pytest.mark.parametrize(
    "line",
    ['{"event": "step"}', '{"event": "step", "step": 1}', '{"event": []}', '{"event": "step", "step": {}}'],
)
def test_metrics_that_are_none_are_named_by_verify(tmp_path, lora_run, capfd, line):
    run = shutil.copytree(lora_run, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    assert "is not an event" in refused(capfd, ["verify", str(run)])
    assert main(["inspect", str(run), "--step", "1"]) == 0


@pytest.mark.parametrize("text", [b"", b"[]", b"}{", b"num_devices: x\n", b"model_id: [\n", b"\xff"])
def test_a_damaged_run_beside_it_does_not_hinder_auto(tmp_path, tiny, rows, monkeypatch, capfd, text):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    other = made(run.parent / "other")
    (other / "config.yaml").write_bytes(text)
    resume(capfd, config, "auto")
    assert report(run)["resumed_at"] == [2]


def test_a_damaged_best_is_said_set_aside_and_not_the_end_of_the_run(
    tmp_path, tiny, rows, monkeypatch, capfd
):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    first = run / "checkpoints" / "step-000001"
    manifest = json.loads((first / "tunesmith.json").read_text())
    (first / "tunesmith.json").write_text(json.dumps(manifest | {"score": 0.0}))
    flip(first / "adapter_model.safetensors")
    said = resume(capfd, config, run.name)
    assert f"passed over: {first}/adapter_model.safetensors: its content is not what was saved" in said
    assert not first.exists()
    (aside,) = (run / "checkpoints").glob("step-000001.damaged-*")
    assert (aside / "adapter_model.safetensors").exists()
    assert read_manifest(run / "best").step == 3


def test_a_checkpoint_in_the_place_of_another_step_is_passed_over(tmp_path, tiny, rows, monkeypatch, capfd):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    first, second = (run / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    shutil.rmtree(second)
    shutil.copytree(first, second)
    said = resume(capfd, config, run.name)
    assert f"passed over: {second}: holds the checkpoint of step 1" in said
    assert report(run)["resumed_at"] == [1]


def test_what_is_scored_at_the_end_is_the_published_copy(tmp_path, tiny, rows, monkeypatch):
    """The checkpoint may be damaged after it was published."""
    config, run = interrupted(
        tmp_path, tiny, rows, monkeypatch, 3, lora_config=LORA, learning_rate=1.0,
        evaluation={"metric": "token_f1", "max_new_tokens": 3},
    )  # fmt: skip
    scored, publish = [], CheckpointStore.publish_best

    def publish_then_damage(store):
        best = store.best().path
        publish(store)
        flip(best / "adapter_model.safetensors")

    monkeypatch.setattr(CheckpointStore, "publish_best", publish_then_damage)
    monkeypatch.setattr(
        tunesmith.run, "put_back_weights", lambda _parts, folder, _workers: scored.append(folder)
    )
    assert main(["finetune", str(config), "--resume", str(run)]) == 0
    assert scored == [run / "best"]


def test_a_new_run_is_held_before_another_process_can_find_it(tmp_path, tiny, rows, monkeypatch):
    """With ``--resume auto`` a second process would go on with it else."""
    held, write = [], tunesmith.run_open.write_text

    def watched(path, text):
        held.append(is_locked(path.parent))
        write(path, text)

    monkeypatch.setattr("tunesmith.run_open.write_text", watched)
    interrupted(tmp_path, tiny, rows, monkeypatch, 1, lora_config=LORA)
    assert held == [True]


def test_figures_are_on_the_disk_before_the_checkpoint_of_their_steps(tmp_path, tiny, rows, monkeypatch):
    """After a loss of power no checkpoint may be ahead of metrics.jsonl."""
    flushed = []
    monkeypatch.setattr(tunesmith.run, "flush", lambda path: flushed.append((path, path.read_bytes())))
    _, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    assert [path for path, _ in flushed] == [run / "metrics.jsonl"] * 2
    assert [content.count(b'"event": "step"') for _, content in flushed] == [1, 2]


@pytest.mark.parametrize("provider", ["mlflow", "wandb"])
def test_trackers_go_on_with_the_same_run(tmp_path, tiny, rows, monkeypatch, provider):
    pytest.importorskip(provider)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, run = interrupted(
        tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA, logger={"provider": provider}
    )
    known = json.loads((run / "run.json").read_text())["trackers"]
    assert set(known) == {provider}
    assert main(["finetune", str(config), "--resume", str(run)]) == 0
    assert json.loads((run / "run.json").read_text())["trackers"] == known
    if provider == "mlflow":
        (metric,) = (run.parent / "mlruns").rglob("metrics/train_loss_batch")
        assert known[provider] in metric.parts
        assert {int(line.split()[2]) for line in metric.read_text().splitlines()} == {1, 2, 3}
        assert len(list((run.parent / "mlruns").glob("*/*/meta.yaml"))) == 1
    else:
        folders = list((run / "wandb").glob("offline-run-*"))
        # Two folders of one second: a counter stands behind the id.
        assert {folder.name.split("-")[3] for folder in folders} == {known[provider]}
