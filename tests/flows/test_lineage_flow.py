"""Chains of continued fine-tunings, signatures from training to loading, and the rows of a step."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from flow_parts import LORA, events, finetune, refused, refused_run
from tunesmith.checkpoints.manifest import read_manifest
from tunesmith.cli import main

pytestmark = pytest.mark.flow


@pytest.fixture
def keys(tmp_path):
    """Names for the environment of a fresh pair of keys."""
    key = Ed25519PrivateKey.generate()
    signing, verifying = tmp_path / "signing.pem", tmp_path / "verify.pem"
    signing.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    verifying.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return {"TUNESMITH_SIGNING_KEY": str(signing), "TUNESMITH_VERIFY_KEY": str(verifying)}


def lineage(capsys, *arguments):
    capsys.readouterr()
    assert main(["models", "--json", "--lineage", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_continued_adapter_leads_back_to_the_base(tmp_path, tiny, rows, lora_run, outputs, capsys):
    run = finetune(
        tmp_path, tiny, rows, custom_model_tag="second", lora_config=LORA, seed=3,
        initial_adapter_model_ckpt_path=str(lora_run),
    )  # fmt: skip
    third = finetune(
        tmp_path, tiny, rows, custom_model_tag="third", lora_config=LORA,
        initial_adapter_model_ckpt_path=str(run / "best"),
    )  # fmt: skip
    chain = lineage(capsys, "third", "--output-dir", tmp_path / "outputs")
    assert [item["tag"] for item in chain["generations"]] == ["third", "second", "lora"]
    assert [item["folder"] for item in chain["generations"]] == [
        str(run / "best") for run in (third, run, lora_run)
    ]
    first = chain["generations"][-1]
    digest = hashlib.sha256((lora_run / "best" / "tunesmith.json").read_bytes()).hexdigest()
    assert first["manifest_sha256"] == digest
    assert chain["generations"][1]["parent_adapter"]["manifest_sha256"] == digest
    data = hashlib.sha256((rows / "train.jsonl").read_bytes()).hexdigest()
    assert {item["data"]["train"]["sha256"] for item in chain["generations"]} == {data}
    assert [item["seed"] for item in chain["generations"]] == [42, 3, 42]
    weights = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert chain["base"]["files"] == {"model.safetensors": weights}
    assert chain["lost"] is None
    assert main(["models", "--lineage", "third", "--output-dir", str(tmp_path / "outputs")]) == 0
    out = capsys.readouterr().out
    assert out.index("third") < out.index("second") < out.index("lora, step 6,")
    assert f"lora  {lora_run / 'best'}\n" in out


def test_an_adapter_on_a_tuned_model_leads_through_it(tmp_path, tiny, rows, full_run, capsys):
    run = finetune(
        tmp_path, tiny, rows, custom_model_tag="top", lora_config=LORA,
        initial_base_model_ckpt_path=str(full_run),
    )  # fmt: skip
    chain = lineage(capsys, run)
    assert [(item["tag"], item["method"]) for item in chain["generations"]] == [
        ("top", "lora"), ("full", "full"),
    ]  # fmt: skip
    assert chain["base"]["source"] == str(tiny.resolve())
    named_directly = finetune(tmp_path, full_run / "best", rows, lora_config=LORA)
    assert [item["tag"] for item in lineage(capsys, named_directly)["generations"]][1:] == ["full"]


def test_a_chain_whose_parent_was_trained_again_is_said_to_end(tmp_path, tiny, rows, lora_run, capsys):
    parent = shutil.copytree(lora_run, tmp_path / "parent")
    run = finetune(tmp_path, tiny, rows, lora_config=LORA, initial_adapter_model_ckpt_path=str(parent))
    for name in ("best", "checkpoints"):
        shutil.rmtree(parent / name)
    other = finetune(tmp_path, tiny, rows, lora_config=LORA)
    shutil.copytree(other / "best", parent / "best")
    chain = lineage(capsys, run)
    assert len(chain["generations"]) == 1
    assert chain["base"] is None
    assert f"{parent / 'best'}: holds another checkpoint than the parent (lora, step " in chain["lost"]


def test_a_manifest_says_how_the_run_was_made(lora_run):
    manifest = read_manifest(lora_run / "best")
    assert manifest.seed == 42
    assert manifest.code_version == manifest.versions["tunesmith"]
    assert {"processor", "threads"} <= set(manifest.environment)
    assert (manifest.parent, manifest.parent_adapter, manifest.parent_base) == (None, None, None)


def test_signed_from_training_to_loading(tmp_path, tiny, rows, lora_run, keys, monkeypatch, capfd):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    run = finetune(
        tmp_path, tiny, rows, lora_config=LORA, custom_model_tag="signed", num_checkpoints_to_keep=9
    )
    forwarded = tmp_path / "outputs" / "lora_fine_tuning" / "signed"
    for folder in (run / "best", forwarded, *(run / "checkpoints").iterdir()):
        assert (folder / "tunesmith.json.sig").is_file()
    monkeypatch.delenv("TUNESMITH_SIGNING_KEY")
    valid = str(rows / "valid.jsonl")
    for good in (run, forwarded):
        assert main(["evaluate", str(good), "--data", valid, "--max-rows", "1", "--max-new-tokens", "2"]) == 0
    # The training rows are others now, the manifest says so, and every file fits it.
    manifest = run / "best" / "tunesmith.json"
    manifest.write_text(manifest.read_text().replace('"rows": 20', '"rows": 21'))
    for bad, fault in ((run, "was changed, or signed by another key"), (lora_run, "is not signed")):
        for command in (
            ["evaluate", str(bad), "--data", valid],
            ["chat", str(bad)],
            ["merge", str(bad), "-o", str(tmp_path / "m")],
        ):
            assert fault in refused(capfd, command, code=3)
    monkeypatch.setenv("TUNESMITH_SIGNING_KEY", keys["TUNESMITH_SIGNING_KEY"])
    continued = {"lora_config": LORA, "initial_adapter_model_ckpt_path": str(lora_run)}
    (tmp_path / "again").mkdir()
    assert "is not signed" in refused_run(capfd, tmp_path / "again", tiny, rows, code=3, **continued)


def test_a_run_that_could_not_be_loaded_again_does_not_begin(tmp_path, tiny, rows, keys, monkeypatch, capfd):
    monkeypatch.setenv("TUNESMITH_VERIFY_KEY", keys["TUNESMITH_VERIFY_KEY"])
    err = refused_run(capfd, tmp_path, tiny, rows, lora_config=LORA)
    assert "TUNESMITH_VERIFY_KEY: asks for signatures" in err


def test_a_key_never_comes_out_again(tmp_path, tiny, rows, keys, monkeypatch, capfd):
    """What a user puts into the variable by mistake is in no message."""
    secret = Path(keys["TUNESMITH_SIGNING_KEY"]).read_text()
    monkeypatch.setenv("TUNESMITH_SIGNING_KEY", secret)
    err = refused_run(capfd, tmp_path, tiny, rows, lora_config=LORA)
    assert "give the path of a PEM file" in err
    assert secret.splitlines()[1] not in err


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_inspect_names_the_rows_that_were_trained(lora_run, rows, step, capsys):
    assert main(["inspect", str(lora_run), "--step", str(step), "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    (event,) = [event for event in events(lora_run, "step") if event["step"] == step]
    order = sorted(
        range(20),
        key=lambda row: hashlib.blake2b(b"42/%d/%d" % (event["epoch"], row), digest_size=16).digest(),
    )
    place = 8 * ((step - 1) % 3)
    assert [row["row"] - 1 for row in view["rows"]] == order[place : place + 8]
    assert [row["place"] for row in view["rows"]] == [
        f"{rows / 'train.jsonl'}:{row + 1}" for row in order[place : place + 8]
    ]
    assert sum(row["tokens"] for row in view["rows"]) == event["real_tokens"]
    assert sum(row["trained_tokens"] for row in view["rows"]) == event["trained_tokens"]
    assert (view["loss"], view["epoch"]) == (event["train_loss_batch"], event["epoch"])
    assert view["total_steps"] == 6
    assert view["notices"] == []


def test_inspect_for_people_by_tag(outputs, capsys):
    assert main(["inspect", "lora", "--step", "2", "--output-dir", str(outputs)]) == 0
    assert "Step 2 of 6, epoch 1; loss " in capsys.readouterr().out


def test_inspect_refuses_a_step_that_the_run_has_not(lora_run, capfd):
    err = refused(capfd, ["inspect", str(lora_run), "--step", "7"])
    assert err == "Error: --step 7: this run has steps 1 to 6; name one of them\n"
