"""Wrong input: one clear line on standard error, the right exit code, no traceback, nothing half-written."""

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny_models
from flow_parts import (
    LORA,
    finetune,
    refused,
    refused_run,
    report,
    runs_in,
    settings_for,
    write_config,
)
from tunesmith.checkpoints.manifest import verify
from tunesmith.cli import main

pytestmark = pytest.mark.flow


# --- the configuration


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"lerning_rate": 1e-4}, ["line 8: no setting lerning_rate", "closest is learning_rate"]),
        ({"learning_rate": "0.01"}, ['line 6: learning_rate is "0.01"', "number"]),
        ({"num_epochs": 0}, ["line 4: num_epochs is 0", "greater than 0"]),
        ({"num_epochs": 1.5}, ["num_epochs is 1.5", "integer"]),
        ({"num_epochs": True}, ["num_epochs is true"]),
        ({"optimizer": {"adam_betas": [0.9]}}, ["optimizer.adam_betas"]),
        ({"optimizer": {"weight_decy": 0.1}}, ["line 9: no setting optimizer.weight_decy", "weight_decay"]),
        ({"lora_config": {"rank": 8}}, ["no setting lora_config.rank"]),
        ({"lora_config": [8]}, ["lora_config is [8]"]),
        ({"model_id": ...}, ["model_id is missing"]),
        ({"train_path": ""}, ["train_path"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"learning_rate": math.nan}, ["learning_rate is NaN"]),
        ({"evaluation": {"metric": "exact_mach"}}, ["no metric exact_mach", "closest is exact_match"]),
        ({"evaluation": {}, "valid_path": ...}, ["evaluation", "set valid_path or test_path"]),
        ({"best_metric": "token_f1"}, ["best_metric: is token_f1, which is not measured"]),
        (
            {"best_metric": "token_f1", "evaluation": {"metric": "exact_match"}},
            ["best_metric: is token_f1, which is not measured"],
        ),
        ({"initial_adapter_model_ckpt_path": "x"}, ["no lora_config", "add lora_config"]),
        ({"initial_adapter_model_ckpt_path": "nowhere", "lora_config": {}}, ["nowhere", "adapter"]),
        ({"initial_base_model_ckpt_path": "/nowhere/at/all"}, ["/nowhere/at/all", "no such model folder"]),
        ({"context_length": 9999, "embedding_scaling_technique": "none"}, ["9,999", "256"]),
        ({"custom_model_tag": "../../up", "lora_config": {}}, ["'../../up'", "another tag"]),
        ({"forward_checkpoint_config": {"tag": "a//b"}, "lora_config": {}}, ["'a//b'", "another tag"]),
        (
            {"forward_checkpoint_config": {"remote_uri": "nosuch://b"}, "lora_config": {}},
            ["nosuch", "remote_uri"],
        ),
    ],
)
def test_settings(tmp_path, tiny, rows, capfd, changed, parts):
    err = refused_run(capfd, tmp_path, tiny, rows, **changed)
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "is not a mapping"),
        ("model_id: a\nmodel_id: b\n", "line 2: setting model_id is given twice"),
        ("model_id: [a\n", "not valid YAML"),
        ("model_id:\tx: y: z\n", "not valid YAML"),
        ("model_id: !!python/object/apply:os.system [id]\n", "not valid YAML"),
    ],
)
def test_yaml_that_is_none(tmp_path, capfd, text, part):
    (tmp_path / "c.yaml").write_text(text)
    assert part in refused(capfd, ["finetune", str(tmp_path / "c.yaml")])


def test_configuration_files_that_cannot_be_read(tmp_path, capfd):
    assert "no/such.yaml: cannot be read" in refused(capfd, ["finetune", "no/such.yaml"])
    assert "closest shipped file is smollm2-135m-lora.yaml" in refused(
        capfd, ["check", "smolm2-135m-lora.yaml"]
    )
    assert "cannot be read" in refused(capfd, ["check", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes(b"model_id: caf\xe9\n")
    assert "is not UTF-8" in refused(capfd, ["check", str(tmp_path / "latin.yaml")])
    (tmp_path / "model.bin").write_bytes(bytes(range(256)))
    assert "is not UTF-8" in refused(capfd, ["check", str(tmp_path / "model.bin")])


def test_several_faults_are_all_named(tmp_path, tiny, rows, capfd):
    err = refused_run(capfd, tmp_path, tiny, rows, lines=2, lerning_rate=1, num_epochs="two")
    assert "lerning_rate" in err
    assert "num_epochs" in err


def test_arguments(tmp_path, tiny, rows, capfd):
    config = str(write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows)))
    assert "CONFIG: is missing" in refused(capfd, ["finetune"])
    assert "not of the form key=value" in refused(capfd, ["finetune", config, "--set", "num_epochs"])
    assert "closest is num_epochs" in refused(capfd, ["finetune", config, "--set", "num_epoch=2"])
    assert '--set: num_epochs is "x"' in refused(capfd, ["finetune", config, "--set", "num_epochs=x"])
    assert "is not a group" in refused(capfd, ["finetune", config, "--set", "num_epochs.a=1"])
    assert "model_id is missing" in refused(capfd, ["finetune", "--default", "--set", f"train_path={rows}"])
    for wrong in (["finetun"], ["finetune", "--lora"], ["evaluate", str(tiny)], ["merge", "x"], ["chat"]):
        assert main(wrong) == 2
        assert "Traceback" not in capfd.readouterr().err


# --- the rows


def chat(*turns: tuple[str, str], **more) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns], **more})


GOOD = chat(("user", "hi"), ("assistant", "red"))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"messages": [', "JSON"),
        ("[1]", "must be an object"),
        ('{"prompt": "x"}', "no key messages or text"),
        (chat(("human", "hi"), ("assistant", "red")), "unknown role"),
        (chat(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")), "second system message"),
        (chat(("user", "hi"), ("assistant", "  \n ")), "content"),
        (chat(("user", "hi")), "no assistant message"),
        (chat(("user", "hi"), ("assistant", "red"), ("user", "and")), "must be from the assistant"),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "two user messages in a row"),
        (chat(("assistant", "a"), ("user", "b"), ("assistant", "c")), "first turn must be user"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [{"role": "user", "content": 7}]}', "content"),
        ('{"messages": [{"role": "user", "content": NaN}]}', "NaN"),
    ],
)
def test_rows_that_break_a_rule(tmp_path, tiny, rows, capfd, line, rule):
    (tmp_path / "train.jsonl").write_text("\n".join([*[GOOD] * 6, line, GOOD]) + "\n")
    path = str(tmp_path / "train.jsonl")
    err = refused_run(
        capfd, tmp_path, tiny, rows, train_path=path, lines=2
    )  # the row is listed below the line
    assert err.splitlines()[0] == f"Error: {path}: 1 row breaks a rule; mend it or pass --skip-bad-rows"
    assert f"{path}:7: " in err.splitlines()[1]
    assert rule in err.splitlines()[1]


def test_bad_rows_are_skipped_when_asked(tmp_path, tiny, rows, capfd):
    (tmp_path / "train.jsonl").write_text("\n".join([*[GOOD] * 6, "{", GOOD]) + "\n")
    path = str(tmp_path / "train.jsonl")
    run = finetune(tmp_path, tiny, rows, "--skip-bad-rows", train_path=path)
    assert report(run)["rows"] == 7
    assert f"{path}: 1 row breaks a rule, left out (--skip-bad-rows)" in capfd.readouterr().out


def test_twenty_of_many_bad_rows_are_listed(tmp_path, tiny, rows, capfd):
    (tmp_path / "train.jsonl").write_text("nonsense\n" * 30 + GOOD)
    err = refused_run(capfd, tmp_path, tiny, rows, train_path=str(tmp_path / "train.jsonl"), lines=22)
    assert "30 rows break a rule" in err
    assert "and 10 more" in err


def test_all_rows_bad_cannot_be_skipped(tmp_path, tiny, rows, capfd):
    (tmp_path / "train.jsonl").write_text("nonsense\n")
    path = str(tmp_path / "train.jsonl")
    err = refused_run(capfd, tmp_path, tiny, rows, "--skip-bad-rows", train_path=path, lines=2)
    assert "1 row breaks a rule" in err


def test_data_files_that_are_none(tmp_path, tiny, rows, capfd):
    def told(name: str, data: bytes | None) -> str:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        return refused_run(capfd, tmp_path, tiny, rows, train_path=str(path))

    assert "does not exist" in told("absent.jsonl", None)
    assert "has no rows" in told("empty.jsonl", b"")
    assert "has no rows" in told("blank.jsonl", b"\n  \n\n")
    assert "is a Parquet file" in told("x.parquet", b"PAR1" + bytes(40))
    assert "gzip data is truncated" in told("x.jsonl.gz", gzip.compress(GOOD.encode() * 50)[:-20])
    assert "UTF-16" in told("utf16.jsonl", GOOD.encode("utf-16"))
    (tmp_path / "nothing").mkdir()
    assert "has no *.jsonl" in told("nothing", None)


def test_invalid_utf8_is_named_with_its_offset(tmp_path, tiny, rows, capfd):
    data = GOOD.encode() + b"\n" + GOOD.encode().replace(b"red", b"r\xffd") + b"\n"
    (tmp_path / "train.jsonl").write_bytes(data)
    err = refused_run(capfd, tmp_path, tiny, rows, train_path=str(tmp_path / "train.jsonl"), lines=2)
    assert f":2: invalid UTF-8 at byte {data.index(0xFF)} of the file" in err


def test_a_row_longer_than_the_context(tmp_path, tiny, rows, capfd):
    err = refused_run(capfd, tmp_path, tiny, rows, context_length=30, valid_path=...)
    assert "of 20 rows exceed context_length 30" in err
    assert "trained ones" in err
    assert "set on_too_long to drop or truncate" in err
    path = tmp_path / "long.jsonl"
    path.write_text(f"{GOOD}\n{chat(('user', 'zz ' * 300), ('assistant', 'red'))}\n")
    assert f"{path}:2: 1 of 2 rows exceed" in refused_run(capfd, tmp_path, tiny, rows, train_path=str(path))


def test_forms_of_text_that_are_accepted(tmp_path, tiny, rows, capfd):
    odd = chat(("user", "a\u2028b\u0085c <|im_end|> <|im_start|>system"), ("assistant", "<|endoftext|> red"))
    raw = (
        odd.encode("ascii").decode("unicode_escape")
        if False
        else json.dumps(json.loads(odd), ensure_ascii=False)
    )
    plain = f"{raw}\n{GOOD}\n".encode()
    forms = {
        "plain.jsonl": plain,
        "bom.jsonl": b"\xef\xbb\xbf" + plain,
        "crlf.jsonl": plain.replace(b"\n", b"\r\n"),
        "blank.jsonl": b"\n\n" + plain + b"\n \n",
        "packed.jsonl.gz": gzip.compress(plain),
        "unnamed-gzip.jsonl": gzip.compress(plain),
        "no-end.jsonl": plain.rstrip(),
    }
    found = {}
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        settings = settings_for(tmp_path, tiny, rows, train_path=str(tmp_path / name))
        assert main(["check", str(write_config(tmp_path / "c.yaml", settings)), "--json"]) == 0
        facts = json.loads(capfd.readouterr().out)
        found[name] = (facts["splits"][0]["census"], facts["trained_texts"])
    assert all(facts == found["plain.jsonl"] for facts in found.values())
    assert found["plain.jsonl"][0]["rows"] == 2
    assert report(finetune(tmp_path, tiny, rows, train_path=str(tmp_path / "packed.jsonl.gz")))["rows"] == 2


def test_special_token_text_is_trained_as_text(tmp_path, tiny, rows, capfd):
    (tmp_path / "train.jsonl").write_text(chat(("user", "x"), ("assistant", "a <|im_end|> b")) + "\n")
    config = write_config(
        tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows, train_path=str(tmp_path / "train.jsonl"))
    )
    assert main(["check", str(config), "--json"]) == 0
    census = json.loads(capfd.readouterr().out)["splits"][0]["census"]
    tokenizer = tiny_models.chatml_tokenizer()
    as_text = sum(len(tokenizer.encode(piece)) for piece in ("a ", "<|", "im", "_", "end", "|>", " b")) + 1
    assert census["trained_tokens"] > len(tokenizer.encode("a <|im_end|> b")) + 1
    assert abs(census["trained_tokens"] - as_text) <= 6  # merges across the pieces may differ


def test_a_line_of_five_megabytes(tmp_path, tiny, rows, capfd):
    (tmp_path / "train.jsonl").write_text(
        f"{chat(('user', 'assistant ' * 520_000), ('assistant', 'red'))}\n{GOOD}\n"
    )
    path = str(tmp_path / "train.jsonl")
    assert "1 of 2 rows exceed context_length 256" in refused_run(
        capfd, tmp_path, tiny, rows, train_path=path
    )
    assert report(finetune(tmp_path, tiny, rows, train_path=path, on_too_long="drop"))["rows"] == 1


def test_a_valid_file_is_checked_before_training(tmp_path, tiny, rows, capfd):
    (tmp_path / "valid.jsonl").write_text("{}\n")
    err = refused_run(capfd, tmp_path, tiny, rows, valid_path=str(tmp_path / "valid.jsonl"), lines=2)
    assert f"{tmp_path / 'valid.jsonl'}:1: " in err
    test = {"test_path": str(tmp_path / "absent.jsonl")}
    assert "absent.jsonl: does not exist" in refused_run(capfd, tmp_path, tiny, rows, evaluation=test)


def test_check_finds_what_a_run_would_refuse(tmp_path, tiny, rows, capfd):
    for changed, part in [
        ({"evaluation": {"metric": "exact_mach"}}, "no metric exact_mach"),
        ({"evaluation": {"test_path": "absent.jsonl"}}, "absent.jsonl"),
        ({"evaluation": {"metric": "record_match"}}, "record_match"),
        ({"best_metric": "nonsense"}, "not measured"),
        ({"custom_model_tag": "../x", "lora_config": {}}, "another tag"),
        ({"context_length": 20}, "exceed context_length"),
    ]:
        config = write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows, **changed))
        assert part in refused(capfd, ["check", str(config)])


# --- the model


def test_model_folders_that_are_none(tmp_path, tiny, rows, capfd):
    def told(change) -> str:
        model = shutil.copytree(tiny, tmp_path / "copy", dirs_exist_ok=False)
        change(model)
        err = refused_run(capfd, tmp_path, model, rows)
        shutil.rmtree(model)
        return err

    def without_tokenizer(model: Path) -> None:
        (model / "tokenizer.json").unlink()
        (model / "tokenizer_config.json").unlink()

    assert "has no tokenizer" in told(without_tokenizer)
    assert "tokenizer" in told(lambda model: (model / "tokenizer.json").unlink())
    assert "has no config.json" in told(lambda model: (model / "config.json").unlink())
    assert "has no *.safetensors weights" in told(lambda model: (model / "model.safetensors").unlink())
    assert "cannot be loaded" in told(lambda model: (model / "model.safetensors").write_bytes(b"x" * 100))
    assert "cannot be loaded" in told(lambda model: (model / "config.json").write_text("{"))
    assert "cannot be loaded" in told(lambda model: (model / "config.json").write_text("[]"))
    assert "cannot be loaded" in told(lambda model: (model / "tokenizer.json").write_text("{}"))

    def cut(model: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])

    assert "cannot be loaded" in told(cut)

    def of_another_shape(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))

    assert "cannot be loaded" in told(of_another_shape)

    def lacking_a_layer(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))

    assert "layers.2" in told(lacking_a_layer)

    def no_template(model: Path) -> None:
        (model / "chat_template.jinja").unlink()

    model = shutil.copytree(tiny, tmp_path / "copy")
    no_template(model)
    assert "set generation_config.prompt_format" in refused_run(capfd, tmp_path, model, rows)


def test_an_unreachable_hub(tmp_path, rows, capfd):
    err = refused_run(capfd, tmp_path, Path("some-owner/some-model"), rows)
    assert "some-owner/some-model: is neither a catalog name" in err
    assert "set model_id to a local folder with config.json, tokenizer.json and *.safetensors" in err


def test_names_near_a_catalog_name(tmp_path, rows, capfd):
    err = refused_run(capfd, tmp_path, Path("smollm2-135m-instruct-q5"), rows)
    assert "closest catalog name is smollm2-135m-instruct-q4" in err
    assert "no such model folder" in refused_run(capfd, tmp_path, Path("/no/such/model"), rows)


def test_lora_settings_that_do_not_fit(tmp_path, tiny, rows, capfd):
    def told(**lora) -> str:
        return refused_run(capfd, tmp_path, tiny, rows, lora_config=lora)

    err = told(target_modules=["q_prj"])
    assert "lora_config.target_modules: no layer of this model is called q_prj" in err
    assert "closest is q_proj; it has embed_tokens, q_proj, k_proj" in err
    assert "PEFT" in told(r=0)
    assert "PEFT" in told(r="eight")
    assert "PEFT" in told(target_modules="no_such_.*")
    assert "PEFT" in told(layers_to_transform=[99], target_modules=["q_proj"])
    assert "PEFT" in told(init_lora_weights="nonsense")


def test_an_adapter_continued_with_other_settings_is_refused(tmp_path, tiny, rows, lora_run, capfd):
    start = {"initial_adapter_model_ckpt_path": str(lora_run / "best")}
    err = refused_run(capfd, tmp_path, tiny, rows, lora_config={"r": 16}, **start)
    assert "lora_config.r is 16, the adapter has 4" in err


# --- places that cannot be written


def test_an_output_folder_that_cannot_be_written(tmp_path, tiny, rows, capfd):
    (tmp_path / "file").write_text("x")
    err = refused_run(capfd, tmp_path, tiny, rows, output_dir=str(tmp_path / "file" / "outputs"))
    assert f"{tmp_path / 'file' / 'outputs'}: cannot be written" in err
    assert "set output_dir to a folder you can write" in err
    storage = {"remote_uri": str(tmp_path / "file" / "storage")}
    err = refused_run(capfd, tmp_path, tiny, rows, forward_checkpoint_config=storage, lora_config=LORA)
    assert f"{tmp_path / 'file' / 'storage'}" in err
    assert "cannot be written" in err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if (
        shutil.which("mount") is None
        or os.geteuid() != 0
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_while_saving(tmp_path, tiny, rows, small_disk, capfd):
    schedule = {"unit": "steps", "frequency": 1}
    err = refused_run(
        capfd, tmp_path, tiny, rows, code=3, output_dir=str(small_disk), num_checkpoints_to_keep=5, num_epochs=5,
        checkpoint_and_evaluation_frequency=schedule,
    )  # fmt: skip
    assert "no space left on the disk" in err
    assert "free some space or set output_dir to another disk" in err
    (run,) = runs_in(small_disk)
    for checkpoint in (run / "checkpoints").iterdir():
        verify(checkpoint)


# --- trackers


@pytest.mark.parametrize(
    ("provider", "package"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("tensorboard", "tensorboard")]
)
def test_a_tracker_that_is_not_installed(tmp_path, tiny, rows, capfd, monkeypatch, provider, package):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    err = refused_run(capfd, tmp_path, tiny, rows, logger={"provider": provider})
    assert "not installed" in err
    assert f"pip install 'tunesmith[{provider}]'" in err


def test_a_tracker_that_does_not_exist(tmp_path, tiny, rows, capfd):
    assert 'logger.provider is "comet"' in refused_run(
        capfd, tmp_path, tiny, rows, logger={"provider": "comet"}
    )


# --- other commands


def test_models_that_are_none(tmp_path, rows, capfd, lora_run):
    data = str(rows / "valid.jsonl")
    assert "nowhere" in refused(capfd, ["evaluate", "nowhere", "--data", data])
    assert "no config.json" in refused(capfd, ["evaluate", str(tmp_path), "--data", data])
    assert "does not exist" in refused(
        capfd, ["evaluate", str(lora_run), "--data", str(tmp_path / "x.jsonl")]
    )
    assert "closest is exact_match" in refused(
        capfd, ["evaluate", str(lora_run), "--data", data, "--metric", "exactmatch"]
    )
    (tmp_path / "long.jsonl").write_text(chat(("user", "zz " * 300), ("assistant", "red")) + "\n")
    err = refused(capfd, ["evaluate", str(lora_run), "--data", str(tmp_path / "long.jsonl")])
    assert "longer than" in err or "exceed" in err
    assert "on_too_long" not in err  # a setting this command does not have
    (tmp_path / "empty-run").mkdir()
    (tmp_path / "empty-run" / "config.yaml").write_text("model_id: x")
    assert "no checkpoint yet" in refused(capfd, ["chat", str(tmp_path / "empty-run")])


def test_merge_places_that_cannot_be_written(tmp_path, lora_run, capfd):
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused(capfd, ["merge", str(lora_run), "-o", str(tmp_path / "file" / "m")])
    assert "exists; name a new folder" in refused(
        capfd, ["merge", str(lora_run), "-o", str(tmp_path / "file")]
    )


def test_yaml_of_a_run_is_free_of_surprises(lora_run):
    settings = yaml.safe_load((lora_run / "config.yaml").read_text())
    assert settings["num_epochs"] == 2
