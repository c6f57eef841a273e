"""Models and checkpoints at URLs: fetched whole and checked, or not at all; what readers see while one is written."""

import hashlib
import json
import os
import time
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.checkpoints import fetching, remote
from tunesmith.checkpoints.fetching import fetch_model
from tunesmith.checkpoints.manifest import MANIFEST_NAME, SIGNATURE_NAME, hash_files, verify, write_manifest
from tunesmith.checkpoints.remote import upload_checkpoint
from tunesmith.errors import CheckpointError, ModelError, OutputError
from tunesmith.storage import places, retries

STORE = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(retries, "sleep", lambda _: None)


@pytest.fixture
def root():
    name = uuid4().hex
    yield f"memory://{name}"
    if STORE.exists(f"/{name}"):
        STORE.rm(f"/{name}", recursive=True)


@pytest.fixture
def checkpoint(tmp_path, tools):
    """A function: (content) -> a checkpoint folder of two files, one of them weights."""

    def make(content: str, more: str = "") -> Path:
        folder = tmp_path / f"made-{uuid4().hex}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(f"config of {content}")
        (folder / "adapter_model.safetensors").write_text(f"weights of {content}")
        if more:
            (folder / more).write_text(content)
        write_manifest(folder, tools.manifest(hash_files(folder)))
        return folder

    return make


def path(url: str, name: str = "") -> str:
    return f"/{url.removeprefix('memory://')}/{name}".rstrip("/")


def refusal(url, cache, **options):
    with pytest.raises(ModelError) as caught:
        fetch_model(url, cache, ModelError, **options)
    return str(caught.value)


def folders(cache: Path) -> list[Path]:
    return [item for item in cache.rglob("*") if item.is_dir() and item.parent != cache]


def test_a_checkpoint_comes_back_as_it_was_and_is_not_fetched_twice(root, checkpoint, tmp_path, monkeypatch):
    upload_checkpoint(checkpoint("one"), root, "tag")
    first = fetch_model(f"{root}/tag", tmp_path / "cache", ModelError)
    assert verify(first).files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    monkeypatch.setattr(fetching, "download", lambda *_: pytest.fail("fetched again"))
    assert fetch_model(f"{root}/tag/", tmp_path / "cache", ModelError) == first


def test_another_checkpoint_at_the_place_gets_another_folder(root, checkpoint, tmp_path):
    cache = tmp_path / "cache"
    upload_checkpoint(checkpoint("one"), root, "tag")
    one = fetch_model(f"{root}/tag", cache, ModelError)
    upload_checkpoint(checkpoint("two"), root, "tag")
    two = fetch_model(f"{root}/tag", cache, ModelError)
    assert one != two
    assert (one / "adapter_config.json").read_text() == "config of one"
    assert (two / "adapter_config.json").read_text() == "config of two"


def test_a_copy_that_somebody_damaged_is_fetched_again(root, checkpoint, tmp_path):
    upload_checkpoint(checkpoint("one"), root, "tag")
    folder = fetch_model(f"{root}/tag", tmp_path / "cache", ModelError)
    (folder / "adapter_config.json").unlink()
    assert fetch_model(f"{root}/tag", tmp_path / "cache", ModelError) == folder
    verify(folder)


def test_a_run_means_its_best(root, checkpoint, tmp_path):
    upload_checkpoint(checkpoint("best one"), root, "run/best")
    upload_checkpoint(checkpoint("other"), root, "run/checkpoints/step-000001")
    folder = fetch_model(f"{root}/run", tmp_path / "cache", ModelError)
    assert (folder / "adapter_config.json").read_text() == "config of best one"


def test_a_model_of_other_tools_is_taken_without_what_belongs_to_no_model(root, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "x.bin", "original/y.safetensors"):
        STORE.pipe_file(path(root, name), name.encode())
    folder = fetch_model(root, tmp_path / "cache", ModelError)
    assert sorted(item.name for item in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    light = fetch_model(root, tmp_path / "cache", ModelError, weights=False)
    assert sorted(item.name for item in light.iterdir()) == ["config.json", "tokenizer.json"]


def test_large_fetches_are_told(root, tmp_path):
    STORE.pipe_file(path(root, "config.json"), b"{}")
    STORE.pipe_file(path(root, "model.safetensors"), bytes(12 * 10**6))
    said = []
    for _ in range(2):
        fetch_model(root, tmp_path / "cache", ModelError, say=said.append)
    assert said == [f"Fetching 12 MB from {root}"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "not found; name the folder of a model"),
        ({"notes.txt": b""}, "has none of tunesmith.json, adapter_config.json, config.json"),
        ({MANIFEST_NAME: b"{}"}, f"{MANIFEST_NAME}: is no manifest (KeyError)"),
        ({MANIFEST_NAME: b"\xff"}, f"{MANIFEST_NAME}: is no manifest (UnicodeDecodeError)"),
        ({MANIFEST_NAME: b'{"files": {"../x": {"sha256": "a", "bytes": 1}}}'}, "is no manifest (ValueError)"),
        ({MANIFEST_NAME: b'{"files": {"x": {"sha256": "a", "bytes": 1}}}'}, "/x: not found"),
        (
            {MANIFEST_NAME: b'{"files": {"x": {"sha256": "a", "bytes": 1}}}', "x": b"1"},
            "is not what was saved",
        ),
    ],
)
def test_what_is_no_model_is_refused_and_leaves_nothing(root, tmp_path, files, says):
    for name, content in files.items():
        STORE.pipe_file(path(root, name), content)
    text = refusal(root, tmp_path / "cache")
    assert says in text
    assert text.startswith(root)
    assert folders(tmp_path / "cache") == []


def test_secrets_in_the_address_are_refused(tmp_path):
    assert "hush" not in refusal("s3://key:hush@bucket/x", tmp_path)


def test_a_checkpoint_replaced_while_it_is_fetched_is_fetched_anew(root, checkpoint, tmp_path, monkeypatch):
    upload_checkpoint(checkpoint("one"), root, "tag")
    other, real, calls = checkpoint("two"), fetching.download, []

    def replaced(place, target):
        calls.append(place.url)
        if len(calls) == 2:
            upload_checkpoint(other, root, "tag")
        return real(place, target)

    monkeypatch.setattr(fetching, "download", replaced)
    folder = fetch_model(f"{root}/tag", tmp_path / "cache", ModelError)
    assert verify(folder)
    assert (folder / "adapter_model.safetensors").read_text() == "weights of two"


def test_a_place_that_never_rests_is_given_up(root, tmp_path, monkeypatch):
    STORE.pipe_file(path(root, "config.json"), b"{}")
    real, calls = fetching.download, []

    def restless(place, target):
        result = real(place, target)
        calls.append(1)
        STORE.pipe_file(path(root, "config.json"), b"{}" + b" " * len(calls))
        return result

    monkeypatch.setattr(fetching, "download", restless)
    assert "was changed while it was read" in refusal(root, tmp_path / "cache")
    assert len(calls) == 3


def test_what_another_machine_is_fetching_into_the_same_cache_is_left_alone(
    root, checkpoint, tmp_path, monkeypatch
):
    upload_checkpoint(checkpoint("one"), root, "tag")
    cache = tmp_path / "cache"
    folder = fetch_model(f"{root}/tag", cache, ModelError)
    # A process id that no process of this machine has.
    theirs = folder.with_name(f".{folder.name}.tmp-4194304-0123abcd")
    theirs.mkdir()
    (theirs / ".model.part").write_bytes(b"half")
    (folder / "adapter_config.json").unlink()
    fetch_model(f"{root}/tag", cache, ModelError)
    assert (theirs / ".model.part").read_bytes() == b"half"
    long_ago = time.time() - 3600
    for path in (theirs / ".model.part", theirs):
        os.utime(path, (long_ago, long_ago))
    assert fetch_model(f"{root}/tag", cache, ModelError) == folder
    assert not theirs.exists()


def test_a_manifest_of_many_gigabytes_is_not_read(root, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_MOST_READ", 1000)
    STORE.pipe_file(path(root, MANIFEST_NAME), b" " * 1001)
    assert f"{MANIFEST_NAME}: has 1,001 bytes, far more than a file of its name" in refusal(root, tmp_path)


def test_two_processes_may_fetch_the_same(root, checkpoint, tmp_path, monkeypatch):
    upload_checkpoint(checkpoint("one"), root, "tag")
    real, inner = fetching.fetch_file, []

    def another_is_faster(place, target, stamp):
        real(place, target, stamp)
        if not inner:
            inner.append(None)
            inner.append(fetch_model(f"{root}/tag", tmp_path / "cache", ModelError))

    monkeypatch.setattr(fetching, "fetch_file", another_is_faster)
    assert fetch_model(f"{root}/tag", tmp_path / "cache", ModelError) == inner[1]
    verify(inner[1])


# --- What readers see


def visible(url: str) -> dict[str, bytes]:
    start = path(url) + "/"
    return {name.removeprefix(start): STORE.cat_file(name) for name in STORE.find(start)}


def assert_whole_or_absent(files: dict[str, bytes]) -> None:
    """By the manifest for those who read it, and by the weights for those who do not."""
    if MANIFEST_NAME in files:
        for name, stamp in json.loads(files[MANIFEST_NAME])["files"].items():
            assert hashlib.sha256(files[name]).hexdigest() == stamp["sha256"]
    if "adapter_model.safetensors" in files and "adapter_config.json" in files:
        owner = files["adapter_model.safetensors"].removeprefix(b"weights of ")
        assert files["adapter_config.json"] == b"config of " + owner


@pytest.mark.parametrize("stops_after", range(12))
def test_at_every_instant_of_an_upload_a_reader_finds_a_whole_model_or_none(
    root, checkpoint, monkeypatch, stops_after
):
    upload_checkpoint(checkpoint("one", more="extra.json"), root, "tag")
    changes = []

    def watched(real):
        def call(*arguments):
            if len(changes) == stops_after:
                raise OutputError("x", "the line is dead")
            real(*arguments)
            changes.append(1)
            assert_whole_or_absent(visible(f"{root}/tag"))

        return call

    monkeypatch.setattr(remote, "upload", watched(remote.upload))
    monkeypatch.setattr(remote, "remove", watched(remote.remove))
    two = checkpoint("two")
    if stops_after < 8:  # removed: manifest, three files, signature; put: two files, manifest
        with pytest.raises(OutputError, match=f"it is safe in {two}$"):
            upload_checkpoint(two, root, "tag")
        assert MANIFEST_NAME not in visible(f"{root}/tag") or stops_after == 0
    else:
        upload_checkpoint(two, root, "tag")
        assert visible(f"{root}/tag").keys() == {
            "adapter_config.json",
            "adapter_model.safetensors",
            MANIFEST_NAME,
        }
    monkeypatch.undo()
    upload_checkpoint(two, root, "tag")
    assert_whole_or_absent(visible(f"{root}/tag"))


def test_a_damaged_manifest_there_does_not_hinder_the_next_one(root, checkpoint):
    for content in (b"{", b'{"files": ["../../theirs", 3]}', b"[]"):
        STORE.pipe_file(path(root, f"tag/{MANIFEST_NAME}"), content)
        STORE.pipe_file(path(root, "theirs"), b"not ours")
        upload_checkpoint(checkpoint("one"), root, "tag")
        assert STORE.exists(path(root, "theirs"))
        assert_whole_or_absent(visible(f"{root}/tag"))


def test_a_signature_of_an_earlier_one_does_not_stay(root, checkpoint):
    STORE.pipe_file(path(root, f"tag/{SIGNATURE_NAME}"), b"of another")
    upload_checkpoint(checkpoint("one"), root, "tag")
    assert SIGNATURE_NAME not in visible(f"{root}/tag")


def test_a_damaged_checkpoint_is_not_uploaded(root, checkpoint):
    folder = checkpoint("one")
    (folder / "adapter_config.json").write_text("config of ten")
    with pytest.raises(CheckpointError):
        upload_checkpoint(folder, root, "tag")
    assert visible(root) == {}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.integers(0, 300), st.integers(1, 255))
def test_no_changed_byte_is_taken(root, tmp_path, content, at, other):
    content = content or b"x"
    at %= len(content)
    files = {"weights": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    name = uuid4().hex
    STORE.pipe_file(path(root, f"{name}/{MANIFEST_NAME}"), json.dumps({"files": files}).encode())
    STORE.pipe_file(
        path(root, f"{name}/weights"), content[:at] + bytes([content[at] ^ other]) + content[at + 1 :]
    )
    assert "is not what was saved" in refusal(f"{root}/{name}", tmp_path / "cache")
    STORE.pipe_file(path(root, f"{name}/weights"), content)
    folder = fetch_model(f"{root}/{name}", tmp_path / "cache", ModelError)
    assert (folder / "weights").read_bytes() == content
