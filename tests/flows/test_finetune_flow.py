"""``tunesmith finetune`` as a whole: two methods, one file format, and everything a run leaves behind."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tiny_models
from flow_parts import (
    LORA,
    checkpoint_steps,
    events,
    finetune,
    logits,
    report,
    runs_in,
    settings_for,
    tensors,
    write_config,
)
from tunesmith.cli import main
from tunesmith.config.load import load_config
from tunesmith.models.servable import load_servable

pytestmark = pytest.mark.flow
IDS = [1, 20, 33, 47, 5, 260, 2]
TAG = re.compile(r"tiny:[a-z0-9]{5}:[a-z]{5}")
REPORT_FIELDS = {
    "tag", "method", "model_id", "task", "steps", "epochs", "rows", "wall_seconds", "seconds_to_first_step",
    "real_tokens", "trained_tokens", "real_tokens_per_second", "trained_tokens_per_second", "peak_rss_bytes",
    "predicted_peak_rss_bytes", "trainable_parameters", "total_parameters", "checkpoint_bytes",
    "best_checkpoint", "eval_loss", "perplexity", "before", "after", "versions", "machine", "data", "status",
}  # fmt: skip
DOCUMENTED_TARGETS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head",
]  # fmt: skip


# --- the two methods, and what a run leaves


def test_the_same_file_with_and_without_lora_config_trains_both_ways(lora_run, full_run):
    lora, full = report(lora_run), report(full_run)
    assert (lora["method"], full["method"]) == ("lora", "full")
    assert lora["data"] == full["data"]
    assert full["trainable_parameters"] == full["total_parameters"]
    assert lora["trainable_parameters"] == lora["total_parameters"] - full["total_parameters"]
    for found in (lora, full):
        assert found["after"]["loss"] < found["before"]["loss"]
    assert lora["before"]["loss"] == pytest.approx(full["before"]["loss"], rel=1e-6)  # the same base


@pytest.mark.parametrize("method", ["lora", "full"])
def test_files_a_run_leaves(method, request):
    run = request.getfixturevalue(f"{method}_run")
    found = report(run)
    assert set(found) >= REPORT_FIELDS
    assert found["status"] == "finished"
    assert found["tag"] == method
    assert found["best_checkpoint"] == str((run / "best").resolve())
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert method in (run / "report.md").read_text()
    assert checkpoint_steps(run)[-1] == found["steps"] == 6
    assert [event["step"] for event in events(run, "step")] == [1, 2, 3, 4, 5, 6]
    assert {
        ".lock",
        "run.json",
        "checkpoints",
        "best",
        "config.yaml",
        "metrics.jsonl",
        "report.json",
        "report.md",
        "loss.png",
    } == {path.name for path in run.iterdir()}
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    names = {path.name for path in (run / "best").iterdir()}
    assert {
        weights,
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "tunesmith.json",
    } <= names


@pytest.mark.parametrize("method", ["lora", "full"])
def test_config_yaml_reloads_to_the_same_configuration(method, request):
    run = request.getfixturevalue(f"{method}_run")
    again = load_config(str(run / "config.yaml"))
    assert again.as_yaml() == (run / "config.yaml").read_text()
    first = load_config(str(run.parent.parent / "config.yaml"))  # the last one written there: full
    if method == "full":
        assert first.config == again.config


def test_real_and_trained_tokens_are_counted_once_a_row(lora_run, rows):
    tokenizer = tiny_models.chatml_tokenizer()
    real = trained = 0
    for line in (rows / "train.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        real += len(tokenizer.apply_chat_template(messages, return_dict=False))
        trained += len(tokenizer.encode(messages[1]["content"] + "<|im_end|>"))
    assert (report(lora_run)["real_tokens"], report(lora_run)["trained_tokens"]) == (2 * real, 2 * trained)


def test_last_lines_name_the_best_checkpoint_and_the_bucket(tmp_path, tiny, rows, capsys):
    run = finetune(tmp_path, tiny, rows, custom_model_tag="mine", lora_config=LORA)
    out = capsys.readouterr().out.splitlines()
    at = out.index("Best checkpoint is stored in:")
    assert out[at + 1] == str(run / "best")
    loss = report(run)["eval_loss"]
    assert out[at + 2].startswith(f"Eval loss: {loss:.4f}, perplexity: ")
    bucket = tmp_path / "outputs" / "lora_fine_tuning" / "mine"
    assert out[at + 3] == f"Note: LoRA weights will also be stored in path {bucket} under mine bucket."


def test_nothing_goes_to_standard_error(tmp_path, tiny, rows, capfd):
    finetune(tmp_path, tiny, rows, lora_config={})
    finetune(tmp_path, tiny, rows)
    assert capfd.readouterr().err == ""


# --- tags and places


def test_a_tag_is_model_user_and_random_letters_whatever_the_environment(tmp_path, tiny, rows, monkeypatch):
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    tag = report(finetune(tmp_path, tiny, rows, lora_config=LORA))["tag"]
    assert TAG.fullmatch(tag)
    assert (tmp_path / "outputs" / "lora_fine_tuning" / tag / "adapter_model.safetensors").is_file()


def test_full_parameter_runs_are_not_forwarded(outputs):
    assert {path.name for path in (outputs / "lora_fine_tuning").iterdir()} == {"lora"}


@pytest.mark.parametrize(
    ("environ", "remote_uri", "wanted"),
    [
        ({"ANYSCALE_ARTIFACT_STORAGE": "b"}, None, "b"),
        ({"ANYSCALE_ARTIFACT_STORAGE": "b", "TUNESMITH_STORAGE": "a"}, None, "a"),
        ({"ANYSCALE_ARTIFACT_STORAGE": "b", "TUNESMITH_STORAGE": "a"}, "c", "c"),
    ],
)
def test_where_the_best_checkpoint_is_forwarded(
    tmp_path, tiny, rows, monkeypatch, environ, remote_uri, wanted
):
    for name, folder in environ.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    forward = {"tag": "team/one", "remote_uri": str(tmp_path / remote_uri) if remote_uri else None}
    run = finetune(tmp_path, tiny, rows, lora_config=LORA, forward_checkpoint_config=forward)
    copy = tmp_path / wanted / "lora_fine_tuning" / "team" / "one"
    for file in (run / "best").iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / "outputs" / "lora_fine_tuning").exists()


def test_forwarding_through_a_url(tmp_path, tiny, rows):
    forward = {"remote_uri": "memory://bucket"}
    run = finetune(
        tmp_path, tiny, rows, lora_config=LORA, custom_model_tag="t", forward_checkpoint_config=forward
    )
    import fsspec

    store = fsspec.filesystem("memory")
    at = "/bucket/lora_fine_tuning/t/adapter_model.safetensors"
    assert store.cat_file(at) == (run / "best" / "adapter_model.safetensors").read_bytes()


# --- which checkpoint is best, and when there is one


def test_the_lowest_eval_loss_is_best_and_the_newest_is_kept_too(tmp_path, tiny, rows):
    run = finetune(
        tmp_path, tiny, rows, num_epochs=5, learning_rate=0.02, lr_scheduler_type="constant", lora_config=LORA
    )
    losses = {event["step"]: event["eval_loss"] for event in events(run, "eval")}
    assert sorted(losses) == [3, 6, 9, 12, 15]
    best = min(losses, key=lambda step: losses[step])
    assert best == 12, "the loss must get worse again, or the test shows nothing"
    assert json.loads((run / "best" / "tunesmith.json").read_text())["step"] == best
    assert report(run)["eval_loss"] == losses[best]
    assert report(run)["after"]["loss"] == pytest.approx(losses[best], rel=1e-6)  # scored on the best one
    assert checkpoint_steps(run) == [best, 15]


def test_a_task_metric_can_decide(tmp_path, tiny, rows):
    run = finetune(
        tmp_path, tiny, rows, num_epochs=5, learning_rate=0.1, lr_scheduler_type="constant",
        best_metric="token_f1", evaluation={"metric": "token_f1", "max_new_tokens": 6}, num_checkpoints_to_keep=2,
    )  # fmt: skip
    values = {event["step"]: event["metrics"]["token_f1"] for event in events(run, "eval")}
    top = max(values.values())
    assert len(set(values.values())) > 1
    best = json.loads((run / "best" / "tunesmith.json").read_text())
    assert values[best["step"]] == best["metrics"]["token_f1"] == top
    assert max(values[step] for step in checkpoint_steps(run)) == top
    assert len(checkpoint_steps(run)) in (2, 3)


def test_without_validation_rows_the_newest_checkpoint_is_best(tmp_path, tiny, rows):
    run = finetune(tmp_path, tiny, rows, valid_path=..., num_epochs=3)
    assert report(run)["eval_loss"] is None
    assert json.loads((run / "best" / "tunesmith.json").read_text())["step"] == 9
    assert checkpoint_steps(run) == [9]


def test_a_schedule_in_steps_evaluates_and_saves_and_ends_on_the_last_step(tmp_path, tiny, rows):
    schedule = {"unit": "steps", "frequency": 4}
    run = finetune(
        tmp_path,
        tiny,
        rows,
        num_epochs=3,
        checkpoint_and_evaluation_frequency=schedule,
        num_checkpoints_to_keep=9,
    )
    assert [event["step"] for event in events(run, "eval")] == [4, 8, 9]
    assert checkpoint_steps(run) == [4, 8, 9]


def test_a_schedule_of_two_epochs(tmp_path, tiny, rows):
    schedule = {"unit": "epochs", "frequency": 2}
    run = finetune(tmp_path, tiny, rows, num_epochs=5, checkpoint_and_evaluation_frequency=schedule)
    assert [event["step"] for event in events(run, "eval")] == [6, 12, 15]
    assert [event["epoch"] for event in events(run, "epoch")] == [1, 2, 3, 4, 5]


def test_without_num_epochs_enough_whole_epochs_for_min_update_steps(tmp_path, tiny, rows):
    run = finetune(tmp_path, tiny, rows, num_epochs=..., min_update_steps=4)
    assert (report(run)["epochs"], report(run)["steps"]) == (2, 6)


def test_eval_first_scores_the_base(tmp_path, tiny, rows, lora_run):
    run = finetune(tmp_path, tiny, rows, eval_first=True, lora_config=LORA)
    assert report(run)["before"]["loss"] == pytest.approx(report(lora_run)["before"]["loss"], rel=1e-6)
    assert report(finetune(tmp_path, tiny, rows, lora_config=LORA))["before"] is None


# --- exactness


def comparable(run: Path) -> list[dict]:
    keys = ("step", "epoch", "learning_rate", "train_loss_batch", "grad_norm", "trained_tokens")
    steps = [{key: event[key] for key in keys} for event in events(run, "step")]
    return steps + [{"eval": event["eval_loss"], **event["metrics"]} for event in events(run, "eval")]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_runs_of_one_file_are_equal_bit_for_bit(tmp_path, tiny, rows, method):
    more = {"lora_config": {}} if method == "lora" else {"learning_rate": 0.001}  # {}: with dropout
    first, second = (finetune(tmp_path, tiny, rows, num_epochs=2, **more) for _ in range(2))
    assert comparable(first) == comparable(second)
    for file in (first / "best").glob("*.safetensors"):
        assert file.read_bytes() == (second / "best" / file.name).read_bytes()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_split_into_micro_batches_never_changes_the_result(tmp_path, tiny, rows, method, monkeypatch):
    more = {"lora_config": LORA} if method == "lora" else {}
    settings = {"num_epochs": 2, "learning_rate": 0.001, **more}
    whole = finetune(tmp_path, tiny, rows, **settings)
    monkeypatch.setattr("tunesmith.assembly.TRAIN_TOKEN_BUDGET", 60)
    parts = finetune(tmp_path, tiny, rows, **settings)
    for one, other in zip(events(whole, "step"), events(parts, "step"), strict=True):
        assert one["train_loss_batch"] == pytest.approx(other["train_loss_batch"], abs=1e-5)
    other = tensors(parts / "best")
    for name, tensor in tensors(whole / "best").items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=0)


def test_gradient_accumulation_is_one_larger_batch(tmp_path, tiny, rows):
    one = finetune(tmp_path, tiny, rows, train_batch_size_per_device=12)
    other = finetune(tmp_path, tiny, rows, train_batch_size_per_device=4, gradient_accumulation_steps=3)
    assert comparable(one) == comparable(other)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_memory_only(tmp_path, tiny, rows, method):
    more = {"lora_config": {}} if method == "lora" else {}  # with dropout: the same masks must come again
    runs = [finetune(tmp_path, tiny, rows, gradient_checkpointing=on, **more) for on in (False, True)]
    assert comparable(runs[0]) == comparable(runs[1])


# --- how it is called


def test_main_py_is_the_same_command(tmp_path, tiny, rows, monkeypatch):
    config = write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows, lora_config=LORA))
    path = Path(__file__).parents[2] / "main.py"
    spec = importlib.util.spec_from_file_location("main_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main is main
    monkeypatch.setattr(sys, "argv", ["main.py", str(config), "--set", "num_epochs=2"])
    with pytest.raises(SystemExit) as stopped:
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
    assert stopped.value.code == 0
    (run,) = runs_in(tmp_path / "outputs")
    assert report(run)["epochs"] == 2


def test_a_bare_name_is_found_among_the_shipped_files(tmp_path, tiny, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = settings_for(tmp_path, tiny, rows, evaluation=None)
    arguments = [f"--set={key}={json.dumps(value)}" for key, value in overrides.items()]
    assert main(["finetune", "smollm2-135m-lora.yaml", *arguments]) == 0
    (run,) = runs_in(tmp_path / "outputs")
    assert report(run)["model_id"] == str(tiny)


def test_set_wins_over_the_file(tmp_path, tiny, rows):
    run = finetune(
        tmp_path, tiny, rows, "--set", "num_epochs=2", "--set", "lora_config.r=2", learning_rate=1e-3
    )
    assert report(run)["epochs"] == 2
    assert report(run)["method"] == "lora"
    assert json.loads((run / "best" / "adapter_config.json").read_text())["r"] == 2
    assert events(run, "run_started")[0]["config"]["learning_rate"] == 1e-3


def test_default_needs_two_keys_and_explains_the_rest(tmp_path, tiny, rows, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pair = [f"--set=model_id={tiny}", f"--set=train_path={rows / 'train.jsonl'}"]
    assert main(["finetune", "--default", *pair, "--set=min_update_steps=3"]) == 0
    out = capsys.readouterr().out
    (run,) = runs_in(tmp_path / "outputs")
    assert report(run)["method"] == "lora"
    shown = {line.partition(":")[0]: line for line in out.splitlines() if "  # " in line}
    assert shown["model_id"].endswith("# --set")
    for key, reason in {
        "learning_rate": "1e-4 for LoRA", "num_epochs": "min_update_steps", "seed": "same", "task": "assistant turns",
        "lora_config": "selects LoRA", "best_metric": "lowest loss", "output_dir": "beside",
    }.items():  # fmt: skip
        assert reason in shown[key], shown[key]
    for line in shown.values():
        assert line.endswith("# --set") or line.partition("  # default: ")[2] or "selects LoRA" in line, line


# --- rows and lengths


def test_plain_text_rows_are_causal_language_modelling(tmp_path, tiny):
    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"green green blue {number}"}) for number in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    run = finetune(tmp_path, tiny, tmp_path, lora_config=LORA)
    found = report(run)
    assert found["task"] == "causal_lm"
    # Each text is learned to its end: one end-of-sequence token behind it.
    tokens = sum(len(tiny_models.chatml_tokenizer().encode(f"green green blue {n}")) + 1 for n in range(9))
    assert (found["real_tokens"], found["trained_tokens"]) == (tokens, tokens - 9)


@pytest.mark.parametrize(("on_too_long", "kept"), [("drop", 9), ("truncate", 10)])
def test_rows_that_are_too_long(tmp_path, tiny, on_too_long, kept):
    lines = [json.dumps({"text": "red " * (40 if number == 3 else 5)}) for number in range(10)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    run = finetune(tmp_path, tiny, tmp_path, valid_path=..., context_length=20, on_too_long=on_too_long)
    assert report(run)["rows"] == kept
    longest = 20 if kept == 10 else len(tiny_models.chatml_tokenizer().encode("red " * 5)) + 1
    (started,) = events(run, "run_started")
    assert started["header"]["Data"].endswith(f"longest {longest} tokens")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_longer_context_scales_rope_and_is_saved_with_the_model(tmp_path, tiny, rows, method):
    more = {"lora_config": LORA} if method == "lora" else {}
    run = finetune(tmp_path, tiny, rows, context_length=512, eval_first=True, **more)
    plain = AutoConfig.from_pretrained(tiny)
    plain.rope_parameters = {**plain.rope_parameters, "rope_type": "linear", "factor": 2.0}
    folder = run / "best"
    base = AutoModelForCausalLM.from_pretrained(
        tiny if method == "lora" else folder, config=plain, dtype=torch.float32
    )
    wanted = logits(PeftModel.from_pretrained(base, folder) if method == "lora" else base, IDS)
    found = logits(load_servable(str(run), []).model, IDS)
    assert torch.equal(found, wanted)
    if method == "full":
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert saved.config.max_position_embeddings == 512
        assert torch.equal(logits(saved, IDS), wanted)


def test_a_context_can_be_extended_twice(tmp_path, tiny, rows):
    first = finetune(tmp_path, tiny, rows, context_length=512)
    second = finetune(tmp_path, first / "best", rows, context_length=1024)
    rope = AutoConfig.from_pretrained(second / "best").rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)  # of the 256 it was made for


# --- going on from something


@pytest.mark.parametrize("form", ["best", "run"])
def test_an_adapter_is_continued_where_it_ended(tmp_path, tiny, rows, lora_run, form):
    start = lora_run / "best" if form == "best" else lora_run
    run = finetune(
        tmp_path, tiny, rows, initial_adapter_model_ckpt_path=str(start), eval_first=True, lora_config=LORA
    )
    assert report(run)["before"]["loss"] == pytest.approx(report(lora_run)["after"]["loss"], abs=1e-6)
    assert report(run)["after"]["loss"] < report(run)["before"]["loss"]
    assert json.loads((run / "best" / "tunesmith.json").read_text())["parent"] == str(start)


def test_training_starts_from_other_base_weights(tmp_path, tiny, rows, full_run):
    start = str(full_run / "best")
    run = finetune(
        tmp_path, tiny, rows, initial_base_model_ckpt_path=start, eval_first=True, lora_config=LORA
    )
    assert report(run)["before"]["loss"] == pytest.approx(report(full_run)["after"]["loss"], abs=1e-6)
    assert report(run)["model_id"] == str(tiny)
    assert main(["evaluate", str(run), "--data", str(rows / "valid.jsonl"), "--metric", "token_f1"]) == 0


# --- served by others


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", ["documented", "default"])
def test_a_lora_checkpoint_loads_in_plain_peft_with_equal_logits(tmp_path, rows, tied, targets):
    base = tiny_models.save_tiny_model(tmp_path / "tiny", tied=tied)
    lora = {"target_modules": DOCUMENTED_TARGETS} if targets == "documented" else {}
    run = finetune(tmp_path, base, rows, lora_config=lora, num_epochs=2)
    folder = run / "best"
    saved = tensors(folder)
    assert all("lora_" in name for name in saved), "copies of the base's layers do not belong in an adapter"
    assert any("lm_head" in name for name in saved)
    assert any("embed_tokens" in name for name in saved)
    assert sum(tensor.numel() for tensor in saved.values()) == report(run)["trainable_parameters"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    with_ours = logits(load_servable(str(run), []).model, IDS)
    assert torch.equal(with_ours, logits(plain, IDS))
    untuned = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), IDS)
    assert not torch.allclose(with_ours, untuned, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_checkpoint_loads_in_plain_transformers(tmp_path, rows, tied):
    base = tiny_models.save_tiny_model(tmp_path / "tiny", tied=tied)
    run = finetune(tmp_path, base, rows)
    model = AutoModelForCausalLM.from_pretrained(run / "best", dtype=torch.float32)
    assert torch.equal(logits(model, IDS), logits(load_servable(str(run), []).model, IDS))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    tokenizer = AutoTokenizer.from_pretrained(run / "best")
    assert tokenizer.chat_template == tiny_models.CHATML


@pytest.mark.parametrize("kind", ["qwen3", "neox"])
def test_other_model_families_train(tmp_path, rows, kind):
    base = tiny_models.save_tiny_model(tmp_path / "tiny", kind, tied=False)
    run = finetune(tmp_path, base, rows, eval_first=True, lora_config={})
    assert report(run)["after"]["loss"] < report(run)["before"]["loss"]


@pytest.mark.parametrize(
    "lora",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": False},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["v_proj"], "bias": "lora_only"},
    ],
    ids=str,
)
def test_what_was_trained_is_what_is_loaded_whatever_lora_is_asked_for(
    tmp_path, rows, lora, lora_run, capsys
):
    base = tiny_models.save_tiny_model(tmp_path / "tiny", tied=False)
    run = finetune(tmp_path, base, rows, eval_first=True, num_epochs=2, lora_config=lora)
    capsys.readouterr()
    data = str(rows / "valid.jsonl")
    for model, score in ((run, "after"), (base, "before")):
        assert main(["evaluate", str(model), "--data", data, "--max-new-tokens", "1", "--json"]) == 0
        loss = json.loads(capsys.readouterr().out)["loss"]
        assert loss == pytest.approx(report(run)[score]["loss"], abs=2e-5)


def test_prompt_format_replaces_the_template_everywhere(tmp_path, tiny, rows, capsys):
    prompt_format = {
        "user": "Q: {instruction}\n",
        "assistant": "A: {instruction}<|endoftext|>",
        "trailing_assistant": "A: ",
    }
    generation = {"prompt_format": prompt_format, "stopping_sequences": ["blue"]}
    run = finetune(
        tmp_path,
        tiny,
        rows,
        generation_config=generation,
        lora_config=LORA,
        evaluation={"metric": "token_f1"},
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "best")
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == "Q: hi\nA: "
    settings = json.loads((run / "best" / "generation_config.json").read_text())
    assert settings["stop_strings"] == ["blue"]
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") in settings["eos_token_id"]
    capsys.readouterr()
    assert (
        main(["evaluate", str(run), "--data", str(rows / "valid.jsonl"), "--metric", "token_f1", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(
        report(run)["after"]["loss"], rel=1e-6
    )


# --- trackers


def test_tensorboard(tmp_path, tiny, rows):
    run = finetune(tmp_path, tiny, rows, logger={"provider": "tensorboard"})
    assert any(path.stat().st_size > 500 for path in (run / "tensorboard").rglob("events.out.tfevents.*"))


def test_mlflow_keeps_a_local_store_beside_the_runs(tmp_path, tiny, rows, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = finetune(
        tmp_path, tiny, rows, logger={"provider": "mlflow", "provider_config": {"experiment_name": "e"}}
    )
    metrics = list((tmp_path / "outputs" / "mlruns").rglob("metrics/eval_loss"))
    assert len(metrics) == 1
    assert float(metrics[0].read_text().split()[1]) == pytest.approx(report(run)["eval_loss"])


def test_wandb_is_turned_on_by_its_key_which_appears_in_no_file(tmp_path, tiny, rows, monkeypatch, capfd):
    key = "0123456789abcdef0123456789abcdef0badcafe"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    run = finetune(tmp_path, tiny, rows, lora_config=LORA)
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if key.encode() in path.read_bytes()] == []
    assert key not in "".join(capfd.readouterr())
