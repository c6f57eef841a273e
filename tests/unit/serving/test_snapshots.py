"""Copies of adapters: named by content, gone with the last that needs them."""

from pathlib import Path

import pytest

from tunesmith.serving.snapshots import Snapshots


@pytest.fixture
def snapshots(tmp_path: Path):
    found = Snapshots(tmp_path / "copies")
    yield found
    found.close()
    assert list((tmp_path / "copies").iterdir()) == []


def adapter(folder: Path, weights: bytes = b"weights", config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_a_copy_stays_as_it_was(snapshots, tmp_path):
    folder = adapter(tmp_path / "a")
    name = snapshots.take(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"others")
    assert (snapshots.root / name / "adapter_model.safetensors").read_bytes() == b"weights"
    assert snapshots.take(folder) != name


def test_equal_content_has_one_copy_until_its_last_user_goes(snapshots, tmp_path):
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    name = snapshots.take(first)
    assert snapshots.take(second) == name
    assert [path.name for path in snapshots.root.iterdir()] == [name]
    snapshots.drop(name)
    assert (snapshots.root / name / "adapter_config.json").read_text() == "{}"
    snapshots.drop(name)
    assert list(snapshots.root.iterdir()) == []
    assert snapshots.take(first) == name
    assert (snapshots.root / name).is_dir()


def test_names_are_part_of_the_content(snapshots, tmp_path):
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    (first / "vocab.txt").write_text("x")
    (second / "merges.txt").write_text("x")
    assert snapshots.take(first) != snapshots.take(second)


def test_what_a_trainer_left_is_not_copied(snapshots, tmp_path):
    folder = adapter(tmp_path / "a")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "more.json").write_text("{}")
    name = snapshots.take(folder)
    copied = sorted(path.name for path in (snapshots.root / name).iterdir())
    assert copied == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_checkpoint_of_ours_is_copied_whole(snapshots, tmp_path):
    folder = adapter(tmp_path / "a")
    (folder / "tunesmith.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / "more" / "state.bin").write_bytes(b"state")
    (folder / "link").symlink_to("adapter_config.json")
    copy = snapshots.root / snapshots.take(folder)
    assert (copy / "more" / "state.bin").read_bytes() == b"state"
    assert (copy / "link").is_symlink()  # which the check of the manifest refuses


def test_what_cannot_be_read_leaves_nothing(snapshots, tmp_path):
    with pytest.raises(OSError, match="gone"):
        snapshots.take(tmp_path / "gone")
    assert list(snapshots.root.iterdir()) == []
