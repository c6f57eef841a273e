"""The commands around a run: check, evaluate, chat, merge, models."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from flow_parts import LORA, finetune, logits, report, settings_for, write_config
from tunesmith.cli import main
from tunesmith.models.servable import load_servable

pytestmark = pytest.mark.flow
IDS = [1, 20, 33, 47, 5, 260, 2]


# --- check


def test_check_shows_census_trained_tokens_and_every_value(tmp_path, tiny, rows, capsys):
    config = write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows, lora_config=LORA))
    assert main(["check", str(config), "--show", "--rows", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"learning_rate: 0.01  # {config} line " in out
    assert "seed: 42  # default" in out
    assert "lora_config.r: 4" in out
    assert "item 0 colour red" in out
    assert "item 1 colour blue" not in out
    assert "Configuration and data are good." in out
    assert not (tmp_path / "outputs").exists()


def test_check_json_is_all_that_standard_output_holds(tmp_path, tiny, rows, capsys):
    config = write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows))
    assert main(["check", str(config), "--json", "--show"]) == 0
    facts = json.loads(capsys.readouterr().out)
    lengths = [
        len(
            tiny_models.chatml_tokenizer().apply_chat_template(
                json.loads(line)["messages"], return_dict=False
            )
        )
        for line in (rows / "train.jsonl").read_text().splitlines()
    ]
    train = facts["splits"][0]["census"]
    assert (train["rows"], train["tokens"], train["longest"]) == (20, sum(lengths), max(lengths))
    assert (facts["method"], facts["steps"], facts["epochs"]) == ("full", 3, 1)
    assert facts["trained_texts"][0] == ["colour is red<|im_end|>"]


def test_check_needs_no_weights(tmp_path, tiny, rows):
    bare = shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert main(["check", str(write_config(tmp_path / "c.yaml", settings_for(tmp_path, bare, rows)))]) == 0


def test_check_colours_exactly_the_trained_text(tmp_path, tiny, rows, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    config = write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows))
    assert main(["check", str(config), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[" in out
    panel = out[out.index("row 1") :]
    # An escape whose parameters hold a background (40-48) opens a trained piece, the next escape ends it.
    pieces = re.findall(r"\x1b\[(?:[0-9;]*;)?4[0-8][0-9;]*m([^\x1b]*)\x1b", panel)
    assert "".join(pieces).replace("\n", "") == "colour is red<|im_end|>"


# --- evaluate


@pytest.mark.parametrize("reference", ["run", "tag", "best"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_evaluate_gives_the_score_the_run_ended_with(outputs, rows, method, reference, request, capsys):
    run = request.getfixturevalue(f"{method}_run")
    name = {"run": str(run), "tag": method, "best": str(run / "best")}[reference]
    data = str(rows / "valid.jsonl")
    arguments = ["--metric", "token_f1", "--max-new-tokens", "6", "--output-dir", str(outputs), "--json"]
    assert main(["evaluate", name, "--data", data, *arguments]) == 0
    out, err = capsys.readouterr()
    facts, after = json.loads(out), report(run)["after"]
    assert err == ""
    assert facts["loss"] == pytest.approx(after["loss"], abs=1e-6)
    assert facts["perplexity"] == pytest.approx(after["perplexity"], rel=1e-6)
    assert (facts["rows"], facts["value"], facts["interval"]) == (6, after["value"], after["interval"])
    assert len(facts["answers"]) == 6


def test_evaluate_a_base_model_gives_the_score_before(tiny, rows, lora_run, capsys):
    data = str(rows / "valid.jsonl")
    assert (
        main(["evaluate", str(tiny), "--data", data, "--metric", "token_f1", "--max-rows", "2", "--json"])
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["loss"] == pytest.approx(report(lora_run)["before"]["loss"], abs=1e-6)
    assert len(facts["answers"]) == 2


def test_evaluate_for_people(lora_run, rows, capsys):
    assert (
        main(["evaluate", str(lora_run), "--data", str(rows / "valid.jsonl"), "--max-new-tokens", "4"]) == 0
    )
    out = capsys.readouterr().out
    assert f"loss {report(lora_run)['after']['loss']:.4f}" in out
    assert "exact_match" in out
    assert "95 % interval" in out


def test_evaluate_scores_a_causal_lm_run_as_it_was_trained(tmp_path, tiny, rows, capsys):
    run = finetune(tmp_path, tiny, rows, task="causal_lm", lora_config=LORA)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(rows / "valid.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(
        report(run)["after"]["loss"], abs=1e-6
    )


# --- merge


@pytest.mark.parametrize("tied", [True, False])
def test_merged_folder_loads_in_plain_transformers_with_the_unmerged_logits(tmp_path, rows, tied, capsys):
    base = tiny_models.save_tiny_model(tmp_path / "tiny", tied=tied)
    run = finetune(tmp_path, base, rows, lora_config={}, num_epochs=2)  # embed_tokens and lm_head too
    folder = tmp_path / "merged"
    capsys.readouterr()  # what making the tiny model printed
    assert main(["merge", str(run), "-o", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Merged model is stored in:" in out
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    unmerged = logits(load_servable(str(run), []).model, IDS)
    torch.testing.assert_close(logits(merged, IDS), unmerged, atol=1e-4, rtol=0)
    base_logits = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), IDS)
    assert not torch.allclose(base_logits, unmerged, atol=1e-2)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_models.CHATML
    assert merged.generation_config.eos_token_id == [2]
    assert main(["evaluate", str(folder), "--data", str(rows / "valid.jsonl"), "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert loss == pytest.approx(report(run)["after"]["loss"], abs=1e-5)


def test_merge_refuses_an_existing_folder(tmp_path, lora_run, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    assert main(["merge", str(lora_run), "-o", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err == f"Error: {tmp_path / 'mine'}: exists; name a new folder\n"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]


def test_merge_refuses_a_full_parameter_run(tmp_path, full_run, capsys):
    assert main(["merge", str(full_run), "-o", str(tmp_path / "new")]) == 2
    assert "is no LoRA adapter" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_merge_writes_nothing_when_the_logits_differ(tmp_path, lora_run, capsys, monkeypatch):
    monkeypatch.setattr("tunesmith.models.merging.TOLERANCE", 1e-12)
    assert main(["merge", str(lora_run), "-o", str(tmp_path / "new")]) == 3
    err = capsys.readouterr().err
    assert re.search(r"merged and unmerged logits differ by up to \d\.\d\de-0\d, more than 1e-12", err)
    assert not (tmp_path / "new").exists()


def test_merge_says_how_to_go_on_when_the_rows_are_gone(tmp_path, tiny, rows, capsys):
    copy = shutil.copytree(rows, tmp_path / "rows")
    run = finetune(tmp_path, tiny, copy, lora_config=LORA)
    shutil.rmtree(copy)
    capsys.readouterr()
    assert main(["merge", str(run), "-o", str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert "--data" in err
    assert len(err.splitlines()) == 1
    assert main(["merge", str(run), "-o", str(tmp_path / "new"), "--data", str(rows / "valid.jsonl")]) == 0


# --- models


def test_models_lists_what_was_trained(outputs, capsys):
    assert main(["models", "--output-dir", str(outputs), "--json"]) == 0
    listed = {item["tag"]: item for item in json.loads(capsys.readouterr().out)}
    assert set(listed) == {"lora", "full"}
    for method, item in listed.items():
        run = next(outputs.glob(f"*-{method}-*"))
        assert (item["method"], item["path"], item["status"]) == (method, str(run), "finished")
        assert item["best_loss"] == pytest.approx(report(run)["eval_loss"])
        assert item["bytes"] == sum(
            path.stat().st_size for path in (run / "best").iterdir() if path.name != "tunesmith.json"
        )
    assert main(["models", "--output-dir", str(outputs)]) == 0
    assert str(next(outputs.glob("*-lora-*"))) in capsys.readouterr().out


def test_models_lists_a_damaged_run_as_damaged(tmp_path, outputs, capsys):
    copy = shutil.copytree(outputs, tmp_path / "outputs")
    run = next(copy.glob("*-lora-*"))
    (run / "best" / "adapter_model.safetensors").write_bytes(b"short")
    assert main(["models", "--output-dir", str(copy), "--json"]) == 0
    status = {item["tag"]: item["status"] for item in json.loads(capsys.readouterr().out)}
    assert status == {"lora": "damaged", "full": "finished"}


def test_models_where_nothing_was_trained(tmp_path, capsys):
    assert main(["models", "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"Nothing has been trained in {tmp_path}.\n"


# --- chat


def talk(monkeypatch, text: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", *arguments, "--max-new-tokens", "4"])


def test_chat_with_two_models_side_by_side(monkeypatch, tiny, lora_run, capsys):
    assert talk(monkeypatch, "item 1 colour red\n/reset\n\nagain\n", str(lora_run), str(tiny)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("you> ") == 5  # the empty line is asked again, the end of the input ends it
    panels = [line for line in out.splitlines() if line.lstrip("you> ").startswith("╭")]
    assert sum(str(lora_run.parent)[:20] in line for line in panels) == 2 * len({"lora", "base"})
    assert out.endswith("\n")


def test_chat_answers_as_generate_does(monkeypatch, lora_run, tiny, rows, capsys):
    from tunesmith.chat import answer
    from tunesmith.data.conversation import Conversation, Message

    servable = load_servable(str(lora_run), [])
    said = answer(servable, Conversation((Message("user", "item 1 colour red"),)), 4)
    prompt = tiny_models.chatml_tokenizer().apply_chat_template(
        [{"role": "user", "content": "item 1 colour red"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    ids = servable.model.generate(input_ids=prompt, do_sample=False, max_new_tokens=4)[0, prompt.shape[1] :]
    assert said == tiny_models.chatml_tokenizer().decode(ids, skip_special_tokens=True)


def test_chat_goes_on_after_a_conversation_fills_the_context(monkeypatch, tiny, capsys):
    assert talk(monkeypatch, f"{'zz ' * 200}\nhello\n", str(tiny)) == 0
    out = capsys.readouterr().out
    assert "fills the context" in out
    assert out.rindex(str(tiny)[:20]) > out.index("fills the context")


def test_chat_shows_no_control_characters_of_a_model(monkeypatch, tiny, capsys):
    monkeypatch.setattr("tunesmith.chat.answer", lambda *_: "\x1b[31mred\x07")
    assert talk(monkeypatch, "hi\n", str(tiny)) == 0
    out = capsys.readouterr().out
    assert "red" in out
    assert "\x1b" not in out
    assert "\x07" not in out


# --- what must not be mixed up


def test_an_adapter_is_refused_on_another_base(tmp_path, lora_run, rows, capsys):
    torch.manual_seed(1)
    other = tmp_path / "other"
    tiny_models.save_tiny_model(other)
    model = AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(other)
    capsys.readouterr()
    for command in (
        ["evaluate", str(lora_run), "--data", str(rows / "valid.jsonl"), "--base", str(other)],
        ["chat", str(lora_run), "--base", str(other)],
        ["merge", str(lora_run), "--base", str(other), "-o", str(tmp_path / "m")],
    ):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "was trained on other weights" in err
        assert len(err.splitlines()) == 1


def test_continuing_an_adapter_of_another_base_is_refused(tmp_path, lora_run, full_run, rows, capsys):
    settings = settings_for(
        tmp_path,
        full_run / "best",
        rows,
        lora_config=LORA,
        initial_adapter_model_ckpt_path=str(lora_run / "best"),
    )
    assert main(["finetune", str(write_config(tmp_path / "c.yaml", settings))]) == 2
    assert "was trained on other weights" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "tokenizer.json"])
def test_a_flipped_byte_is_refused_by_name(tmp_path, lora_run, rows, tiny, file, capsys):
    copy = shutil.copytree(lora_run, tmp_path / lora_run.name)
    damaged = copy / "best" / file
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    continuing = settings_for(
        tmp_path, tiny, rows, lora_config=LORA, initial_adapter_model_ckpt_path=str(copy / "best")
    )
    config = write_config(tmp_path / "c.yaml", continuing)
    for command in (
        ["evaluate", str(copy), "--data", str(rows / "valid.jsonl")],
        ["chat", str(copy)],
        ["merge", str(copy), "-o", str(tmp_path / "m")],
        ["finetune", str(config)],
    ):
        assert main(command) == 3
        err = capsys.readouterr().err
        assert f"{damaged}: its content is not what was saved" in err
        assert len(err.splitlines()) == 1


def test_a_moved_base_is_named_with_base(tmp_path, rows, capsys):
    base = tiny_models.save_tiny_model(tmp_path / "tiny")
    run = finetune(tmp_path, base, rows, lora_config=LORA)
    shutil.move(base, tmp_path / "moved")
    capsys.readouterr()
    evaluate = ["evaluate", str(run), "--data", str(rows / "valid.jsonl"), "--json"]
    assert main(evaluate) == 2
    assert "--base" in capsys.readouterr().err
    assert main([*evaluate, "--base", str(tmp_path / "moved")]) == 0


def test_help_of_every_command_loads_no_torch():
    from flow_parts import start

    code = (
        "import sys\nfrom tunesmith.cli import main, cli\n"
        "for name in cli.commands:\n    assert main([name, '--help']) == 0\nassert 'torch' not in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
    )
    process = start("-c", code, module=False)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Usage: tunesmith finetune" in out


def test_paths_may_be_relative(lora_run, rows, capsys, monkeypatch):
    monkeypatch.chdir(lora_run.parent.parent)
    relative = lora_run.relative_to(Path.cwd())
    assert main(["evaluate", str(relative), "--data", str(rows / "valid.jsonl"), "--json"]) == 0
