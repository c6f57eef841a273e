"""Chains of continued checkpoints: found by digest, ended where a link is gone or another."""

import dataclasses
import hashlib
import io
import json
import shutil

import pytest
from rich.console import Console

from tunesmith.checkpoints.lineage import parent_of, trace
from tunesmith.checkpoints.listing import print_lineage
from tunesmith.checkpoints.manifest import (
    MANIFEST_NAME,
    BaseWeights,
    Parent,
    hash_files,
    read_manifest,
    write_manifest,
)
from tunesmith.checkpoints.signature import VERIFY_KEY
from tunesmith.errors import CheckpointError, ModelError


@pytest.fixture
def save(tmp_path, tools):
    """Leave a checkpoint at ``outputs/RUN/best``; ``changes`` go into its manifest."""

    def save(run, weights="adapter_model.safetensors", output="outputs", **changes):
        folder = tmp_path / output / run / "best"
        folder.mkdir(parents=True)
        is_lora = weights.startswith("adapter")
        (folder / ("adapter_config.json" if is_lora else "config.json")).write_text("{}")
        (folder / weights).write_bytes(run.encode())
        values = {"tag": f"{run}-tag", "run": run, "code_version": "0.1.0"} | changes
        method = "lora" if is_lora else "full"
        write_manifest(folder, tools.manifest(hash_files(folder), method=method, **values))
        return folder

    return save


@pytest.fixture
def chain(save):
    """full on hub weights <- LoRA on full <- LoRA that goes on with that adapter."""
    full = save("full", "model.safetensors", eval_loss=3.0)
    sha256 = hashlib.sha256(b"full").hexdigest()
    base = BaseWeights(str(full), None, {"model.safetensors": sha256}, "99" * 32)
    old = save("old", base=base, parent=str(full), parent_base=parent_of(full), eval_loss=2.0)
    config = {"initial_adapter_model_ckpt_path": str(old)}
    parents = {"parent_adapter": parent_of(old), "parent_base": parent_of(full)}
    new = save("new", base=base, parent=str(old), config=config, eval_loss=None, **parents)
    return [new, old, full]


@pytest.fixture
def outputs(tmp_path):
    return [tmp_path / "outputs"]


def names(lineage):
    return [item.manifest.tag for item in lineage.generations]


def test_a_parent_is_known_by_the_digest_of_its_manifest(save):
    folder = save("one")
    sha256 = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    assert parent_of(folder) == Parent("one-tag", "one", 120, sha256, str(folder.resolve()))
    assert parent_of(folder.parent) is None


def test_a_chain_leads_back_to_the_base(chain, outputs):
    lineage = trace("new-tag", outputs)
    assert names(lineage) == ["new-tag", "old-tag", "full-tag"]
    assert [item.folder.parent.name for item in lineage.generations] == ["new", "old", "full"]
    assert lineage.lost is None
    assert lineage.base == BaseWeights("org/tiny", "0123abc", {"model.safetensors": "ab" * 32}, "cd" * 32)


def test_a_checkpoint_of_base_weights_is_its_own_chain(save, outputs):
    folder = save("one")
    for reference in ("one", "one-tag", str(folder), str(folder.parent)):
        lineage = trace(reference, outputs)
        assert (names(lineage), lineage.lost) == (["one-tag"], None)


def test_facts_are_json_and_whole(chain, outputs):
    facts = json.loads(json.dumps(trace("new-tag", outputs).facts()))
    assert set(facts) == {"generations", "base", "lost"}
    new, old, full = facts["generations"]
    digests = [hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest() for folder in chain]
    assert [item["manifest_sha256"] for item in (new, old, full)] == digests
    assert new["parent_adapter"]["manifest_sha256"] == digests[1]
    assert old["parent_base"]["manifest_sha256"] == digests[2]
    assert (new["eval_loss"], old["eval_loss"], full["eval_loss"]) == (None, 2.0, 3.0)
    assert full["data"] == {"train": {"path": "train.jsonl", "sha256": "ef" * 32, "rows": 7}}
    assert facts["base"]["revision"] == "0123abc"


def test_a_moved_parent_is_found_by_its_digest(tmp_path, chain, outputs):
    for place in (tmp_path / "outputs" / "renamed", tmp_path / "elsewhere" / "old"):
        place.parent.mkdir(exist_ok=True)
        shutil.move(chain[1].parent, place)
        lineage = trace("new-tag", [*outputs, tmp_path / "elsewhere"])
        assert names(lineage) == ["new-tag", "old-tag", "full-tag"]
        assert lineage.generations[1].folder == place / "best"
        shutil.move(place, chain[1].parent)


@pytest.mark.parametrize("output", ["outputs", "elsewhere"])
def test_a_renamed_run_is_found_beside_the_child_and_beside_where_it_lay(tmp_path, save, output):
    old = save("old", output=output)
    new = save("new", parent=str(old), parent_adapter=parent_of(old))
    renamed = old.parent.rename(tmp_path / output / "renamed")
    assert [item.folder for item in trace(str(new), []).generations] == [new, renamed / "best"]
    # One step folder of several, and beside the child after all have moved.
    (renamed / "checkpoints").mkdir()
    moved = (renamed / "best").rename(renamed / "checkpoints" / "step-000120")
    assert trace(str(new), []).generations[1].folder == moved
    beside = tmp_path / "outputs" / "beside"
    renamed.rename(beside)
    assert trace(str(new), []).generations[1].folder == beside / "checkpoints" / "step-000120"


def test_a_folder_that_is_being_removed_is_no_place_to_find_a_parent(tmp_path, chain, outputs):
    chain[1].parent.rename(tmp_path / "outputs" / ".old.tmp-1-0123abcd")
    lost = trace("new-tag", outputs).lost
    assert lost is not None
    assert "is not there any more" in lost


def test_a_parent_is_found_where_it_was_forwarded_to(tmp_path, chain, outputs):
    place = tmp_path / "outputs" / "lora_fine_tuning" / "team" / "one"
    place.parent.mkdir(parents=True)
    shutil.move(chain[1], place)
    assert trace("new-tag", outputs).generations[1].folder == place


def test_a_lost_parent_ends_the_chain(chain, outputs):
    shutil.rmtree(chain[1])
    lineage = trace("new-tag", outputs)
    assert names(lineage) == ["new-tag"]
    assert lineage.base is None
    assert lineage.lost == (
        f"{chain[1]}: the parent (old-tag, step 120 of old) is not there any more, nor in {outputs[0]}; "
        "name the folder that holds its run with --output-dir"
    )


def test_another_checkpoint_in_the_parents_place_ends_the_chain(chain, outputs):
    was = hashlib.sha256((chain[1] / MANIFEST_NAME).read_bytes()).hexdigest()
    write_manifest(chain[1], dataclasses.replace(read_manifest(chain[1]), eval_loss=0.1))
    now = hashlib.sha256((chain[1] / MANIFEST_NAME).read_bytes()).hexdigest()
    lineage = trace("new-tag", outputs)
    assert names(lineage) == ["new-tag"]
    assert lineage.lost is not None
    assert lineage.lost.startswith(
        f"{chain[1]}: holds another checkpoint than the parent (old-tag, step 120 of old): its manifest's SHA-256 "
        f"is {now[:12]}, recorded was {was[:12]};"
    )


def test_base_weights_other_than_the_parents_own_end_the_chain(save, outputs):
    full = save("full", "model.safetensors")
    base = BaseWeights(str(full), None, {"model.safetensors": "00" * 32}, "99" * 32)
    save("tuned", base=base, parent_base=parent_of(full))
    lineage = trace("tuned-tag", outputs)
    assert names(lineage) == ["tuned-tag"]
    assert lineage.lost == (
        f"{full}: its weights were other ones than its manifest lists when they were trained on"
    )


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        (
            {"config": {"initial_adapter_model_ckpt_path": {"repo_id": "a/b"}}},
            "it continued the adapter {'repo_id': 'a/b'}, of which no manifest was recorded",
        ),
        (
            {"parent": "/old/run", "code_version": None},
            "it continued /old/run, which an older tunesmith recorded by name alone",
        ),
        ({"parent": "/models/of-others"}, None),
    ],
)
def test_a_parent_without_a_record(save, outputs, changes, lost):
    save("one", **changes)
    assert trace("one", outputs).lost == lost


def test_manifests_of_older_versions_are_read(save, outputs):
    folder = save("one")
    file = folder / MANIFEST_NAME
    raw = json.loads(file.read_text())
    for key in ("parent_adapter", "parent_base", "seed", "code_version", "environment"):
        del raw[key]
    file.write_text(json.dumps(raw))
    (only,) = trace("one", outputs).generations
    assert (only.manifest.seed, only.manifest.environment, only.manifest.parent_base) == (None, {}, None)


def test_an_unsigned_checkpoint_is_refused_where_a_key_is_configured(monkeypatch, tmp_path, chain, outputs):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = Ed25519PrivateKey.generate().public_key()
    file = tmp_path / "verify.pem"
    file.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    monkeypatch.setenv(VERIFY_KEY, str(file))
    with pytest.raises(CheckpointError, match="is not signed"):
        trace("new-tag", outputs)


def test_what_is_no_trained_model_is_refused(tmp_path, outputs):
    with pytest.raises(ModelError, match="nothing: no such trained model; see: tunesmith models"):
        trace("nothing", outputs)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no tunesmith\.json in it"):
        trace(str(foreign), outputs)


def drawn(lineage, width=100):
    file = io.StringIO()
    print_lineage(Console(file=file, width=width, highlight=False), lineage)
    return file.getvalue()


def test_the_chain_is_drawn(chain, outputs):
    text = drawn(trace("new-tag", outputs))
    lines = [line.strip(" │└─") for line in text.splitlines()]
    data = "train: train.jsonl, 7 rows, SHA-256 efefefefefef"
    assert lines[:11] == [
        "new-tag", "lora, step 120, no eval loss, 2026-01-02 03:04", data,
        "old-tag", "lora, step 120, eval loss 2.0000, 2026-01-02 03:04", data,
        "full-tag", "full, step 120, eval loss 3.0000, 2026-01-02 03:04", data,
        "org/tiny", "base, revision 0123abc, weights cdcdcdcdcdcd",
    ]  # fmt: skip
    assert lines[11:] == [f"{tag}-tag  {chain[i]}" for i, tag in enumerate(("new", "old", "full"))]


def test_what_a_file_holds_does_not_steer_the_terminal(save, outputs):
    save("one", tag="a\x1b[2Jb", data={"train": {"path": "x\x1b[31m\ny", "sha256": "ef" * 32, "rows": 7}})
    text = drawn(trace("one", outputs))
    assert "\x1b" not in text
    assert "a\\x1b[2Jb" in text
    assert "train: x\\x1b[31m\\ny, 7 rows" in text


def test_a_merged_model_is_drawn_as_such(save, outputs):
    adapter = save("tuned")
    save("merged", "model.safetensors", parent="tuned-tag", parent_adapter=parent_of(adapter), eval_loss=1.0)
    lines = [line.strip(" │└─") for line in drawn(trace("merged-tag", outputs)).splitlines()]
    assert lines[1] == "full, merged, step 120, eval loss 1.0000, 2026-01-02 03:04"
    assert lines[3:5] == ["tuned-tag", "lora, step 120, eval loss 1.2500, 2026-01-02 03:04"]


def test_a_lost_chain_is_drawn_with_its_reason_and_folders_are_not_cut(chain, outputs):
    shutil.rmtree(chain[1])
    text = drawn(trace("new-tag", outputs), width=30)
    assert "\nThe chain ends here: " in text
    assert f"new-tag  {chain[0]}\n" in text
    assert "org/tiny" not in text
