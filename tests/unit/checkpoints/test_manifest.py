import dataclasses
import hashlib
import json
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.checkpoints.manifest import (
    MANIFEST_NAME,
    FileStamp,
    Manifest,
    fingerprint_weights,
    hash_files,
    read_manifest,
    verify,
    write_manifest,
)
from tunesmith.errors import CheckpointError

# SHA-256 of "abc" and of nothing, from FIPS 180-2 and its test vectors.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def checkpoint(tmp_path, tools):
    folder = tmp_path / "step-000120"
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"abc")
    (folder / "deep" / "empty.json").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, tools.manifest(hash_files(folder)))
    return folder


def edit(folder, change):
    path = folder / MANIFEST_NAME
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_files_are_stamped_by_content_and_the_manifest_is_not_among_them(checkpoint):
    assert hash_files(checkpoint) == {
        "adapter_model.safetensors": FileStamp(ABC, 3),
        "deep/empty.json": FileStamp(EMPTY, 0),
        "tokenizer.json": FileStamp(hashlib.sha256(b"{}").hexdigest(), 2),
    }


def test_manifest_comes_back_as_it_was_written(checkpoint, tools):
    manifest = tools.manifest(hash_files(checkpoint))
    read = read_manifest(checkpoint)
    assert read == manifest
    assert isinstance(read, Manifest)
    assert read.total_bytes == 5


def test_manifest_on_disk_has_the_documented_keys(checkpoint):
    raw = json.loads((checkpoint / MANIFEST_NAME).read_text())
    documented = (
        "format method tag run model_id base step epoch eval_loss metrics config data versions created parent "
        "parent_adapter parent_base seed code_version environment"
    )
    assert set(raw) == {*documented.split(), "files", "score"}
    assert set(raw["base"]) == {"source", "revision", "files", "fingerprint"}
    assert raw["files"]["adapter_model.safetensors"] == {"sha256": ABC, "bytes": 3}
    assert raw["format"] == 1


def test_absent_numbers_stay_absent(checkpoint, tools):
    manifest = tools.manifest({}, eval_loss=None, metrics={"f1": float("nan")}, parent="other:tag")
    write_manifest(checkpoint, manifest)
    read = read_manifest(checkpoint)
    assert read.eval_loss is None
    assert read.metrics == {"f1": None}
    assert read.parent == "other:tag"


def test_a_time_without_offset_cannot_be_recorded(tools):
    with pytest.raises(ValueError, match="no UTC offset"):
        tools.manifest({}, created="2026-01-02T03:04:05")


def test_manifest_of_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tunesmith\.json in it"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tunesmith\.json in it"):
        verify(tmp_path / "nowhere")


def test_newer_format_is_refused_with_its_remedy(checkpoint):
    edit(checkpoint, lambda raw: raw.update(format=2, files="another layout"))
    with pytest.raises(CheckpointError, match=r"newer tunesmith \(format 2; .*; install a newer tunesmith"):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.pop("format"), "no format"),
        (lambda raw: raw.update(format="1"), "format is not an integer"),
        (lambda raw: raw.pop("base"), "base: Field required"),
        (lambda raw: raw.update(step="120"), "step: Input should be a valid integer"),
        (lambda raw: raw.update(method="qlora"), "method: Input should be 'lora' or 'full'"),
        (
            lambda raw: raw["files"]["tokenizer.json"].pop("bytes"),
            "files.`tokenizer.json`.bytes: Field required",
        ),
        (lambda raw: raw["files"].update({"../../x": {"sha256": ABC, "bytes": 3}}), "no file name within"),
        (lambda raw: raw["files"].update({"/etc/x": {"sha256": ABC, "bytes": 3}}), "no file name within"),
        (lambda raw: raw.update(created="yesterday"), "Invalid isoformat string"),
    ],
)
def test_damage_is_named(checkpoint, change, says):
    edit(checkpoint, change)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(checkpoint)
    message = str(caught.value)
    assert message.startswith(f"{checkpoint / MANIFEST_NAME}: damaged (")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "\x00", "[" * 100_000, "123"])
def test_no_manifest_at_all_in_the_file(checkpoint, text):
    (checkpoint / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(checkpoint)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_read_or_refused_never_a_crash(tmp_path, tools, data):
    (tmp_path / MANIFEST_NAME).unlink(missing_ok=True)
    write_manifest(tmp_path, tools.manifest({"a": FileStamp(ABC, 3)}), fs=tools.unflushed)
    raw = bytearray((tmp_path / MANIFEST_NAME).read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / MANIFEST_NAME).write_bytes(raw)
    try:
        assert isinstance(read_manifest(tmp_path), Manifest)
    except CheckpointError as error:
        assert MANIFEST_NAME in str(error)  # noqa: PT017 - either outcome is right


def test_untouched_checkpoint_verifies(checkpoint):
    assert verify(checkpoint) == read_manifest(checkpoint)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "deep/empty.json").unlink(), "deep/empty.json: is missing"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"ab"),
            "adapter_model.safetensors: has 2 bytes, 3 were saved",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"abd"),
            "adapter_model.safetensors: its content is not what was saved",
        ),
        (lambda folder: (folder / "deep/more.bin").write_bytes(b"x"), "deep/more.bin: is not part of"),
        (lambda folder: (folder / "link").symlink_to("tokenizer.json"), "link: is not a regular file"),
    ],
)
def test_every_kind_of_damage_is_found_and_named(checkpoint, damage, says):
    damage(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        verify(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint}/{says}")


def test_a_checkpoint_can_be_moved(checkpoint, tmp_path):
    verify(checkpoint.rename(tmp_path / "elsewhere"))


def test_fingerprint_is_what_sha256sum_gives(tmp_path):
    names = ["model-00002.safetensors", "model-00001.safetensors"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(name.encode() * 1000)
    digests, fingerprint = fingerprint_weights([tmp_path / "one" / name for name in names])
    listing = subprocess.run(
        ["sha256sum", *sorted(names)], cwd=tmp_path / "one", capture_output=True, check=True
    ).stdout
    assert {line.split()[1]: line.split()[0] for line in listing.decode().splitlines()} == digests
    total = subprocess.run(["sha256sum"], input=listing, capture_output=True, check=True).stdout
    assert fingerprint == total.decode().split()[0]
    # Neither the folder nor the order matters; content and name do.
    assert fingerprint_weights([tmp_path / "two" / name for name in sorted(names)])[1] == fingerprint
    renamed = (tmp_path / "two" / names[0]).rename(tmp_path / "two" / "other.safetensors")
    assert fingerprint_weights([renamed, tmp_path / "two" / names[1]])[1] != fingerprint


def test_fingerprint_of_a_missing_or_doubled_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint_weights([tmp_path / "none"])
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match="same name"):
        fingerprint_weights([tmp_path / "a", tmp_path / "a"])


def test_manifest_cannot_be_changed_after_the_fact(tools):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tools.manifest({}).step = 3
