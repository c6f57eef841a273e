import errno
import json
import os
import shutil
import subprocess
import sys
import time

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.checkpoints.manifest import MANIFEST_NAME, read_manifest, verify, write_manifest
from tunesmith.checkpoints.store import CheckpointStore, forward, newest_checkpoint, read_checkpoints
from tunesmith.errors import CheckpointError, OutputError

PAYLOAD = 1000


@pytest.fixture
def save(tools):
    """Save a checkpoint of 1000 bytes + 2 whose weights tell its step and generation."""

    def save_step(store, step, score, *, at=None, mark=""):
        def write(folder):
            (folder / "adapter_model.safetensors").write_bytes(f"{step}{mark}".encode().ljust(PAYLOAD))
            (folder / "sub").mkdir()
            (folder / "sub" / "adapter_config.json").write_text("{}")

        created = f"2026-01-02T03:04:05.{at if at is not None else step:06d}+00:00"
        return store.save(step, write, lambda files: tools.manifest(files, step=step, created=created), score)

    return save_step


def steps_on_disk(run_dir):
    return {int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").iterdir()}


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes().decode().strip()


def test_saving_tells_what_was_saved(tmp_path, save):
    started = time.perf_counter()
    saved = save(CheckpointStore(tmp_path / "run", keep=1), 120, 2.5)
    assert saved.path == tmp_path / "run" / "checkpoints" / "step-000120"
    assert (saved.step, saved.score, saved.is_best, saved.bytes) == (120, 2.5, True, PAYLOAD + 2)
    assert 0 < saved.seconds <= time.perf_counter() - started
    verify(saved.path)
    assert read_manifest(saved.path).score == 2.5


@pytest.mark.parametrize(
    ("mode", "scores", "keep", "kept", "best"),
    [
        ("min", [3.0, 1.0, 2.0, 4.0], 1, {2, 4}, 2),
        ("max", [3.0, 1.0, 2.0, 0.0], 1, {1, 4}, 1),
        ("min", [3.0, 1.0, 2.0, 4.0], 2, {2, 3, 4}, 2),
        ("min", [3.0, 2.0, 1.0], 1, {3}, 3),
        ("min", [1.0, 1.0, 1.0], 1, {1, 3}, 1),  # a tie goes to the earlier
        ("min", [None, None, None], 1, {3}, 3),
        ("min", [None, None, None], 2, {2, 3}, 3),
        ("min", [5.0, None, None], 1, {1, 3}, 1),
        ("min", [None, float("nan"), 5.0, float("inf")], 1, {3, 4}, 3),
        ("max", [None, float("inf"), 5.0, None], 1, {3, 4}, 3),
        ("min", [-1.0, 0.0], 1, {1, 2}, 1),
    ],
)
def test_what_is_kept(tmp_path, tools, save, mode, scores, keep, kept, best):
    store = CheckpointStore(tmp_path, keep, mode, fs=tools.unflushed)
    for step, score in enumerate(scores, start=1):
        save(store, step, score)
    assert steps_on_disk(tmp_path) == kept
    assert store.best().step == best
    assert newest_checkpoint(tmp_path).name == f"step-{len(scores):06d}"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scores=st.lists(st.none() | st.floats(-100, 100).map(lambda x: round(x, 1)), min_size=1, max_size=7),
    keep=st.integers(1, 4),
    mode=st.sampled_from(["min", "max"]),
    restart=st.booleans(),
)
def test_kept_are_the_best_n_and_the_newest(tmp_path_factory, tools, save, scores, keep, mode, restart):
    run_dir = tmp_path_factory.mktemp("run")
    store = CheckpointStore(run_dir, keep, mode, fs=tools.unflushed)
    for step, score in enumerate(scores, start=1):
        if restart:
            store = CheckpointStore(run_dir, keep, mode, fs=tools.unflushed)
        saved = save(store, step, score)
        # A plain restatement: count who is strictly ahead of each.
        so_far = dict(enumerate(scores[:step], start=1))

        def ahead(a, b, so_far=so_far):
            if so_far[a] is None or so_far[b] is None:
                return so_far[a] is not None or (so_far[b] is None and a > b)
            if so_far[a] == so_far[b]:
                return a < b
            return (so_far[a] < so_far[b]) == (mode == "min")

        place = {a: sum(ahead(b, a) for b in so_far if b != a) for a in so_far}
        assert steps_on_disk(run_dir) == {a for a in so_far if place[a] < keep or a == step}
        assert place[store.best().step] == 0
        assert saved.is_best == (place[step] == 0)


def test_a_new_process_sees_the_same(tmp_path, save):
    save(CheckpointStore(tmp_path, 1), 10, 1.0)
    save(CheckpointStore(tmp_path, 1), 20, 2.0)
    best = CheckpointStore(tmp_path, 1).best()
    assert (best.step, best.score, best.bytes, best.path.name) == (10, 1.0, PAYLOAD + 2, "step-000010")
    assert CheckpointStore(tmp_path / "empty", 1).best() is None
    assert not (tmp_path / "empty").exists()


def test_the_same_step_saved_again_replaces_it(tmp_path, save, tools):
    store = CheckpointStore(tmp_path, 3)
    save(store, 10, 1.0, mark="first")
    saved = save(store, 10, 3.0, mark="second")
    assert weights(saved.path) == "10second"
    assert store.best().score == 3.0
    assert steps_on_disk(tmp_path) == {10}
    assert tools.hidden_in(tmp_path) == []


def test_a_run_resumed_from_an_early_step_keeps_what_it_saves(tmp_path, save):
    store = CheckpointStore(tmp_path, 1)
    save(store, 60, 1.0, at=1)
    save(store, 120, 2.0, at=2)
    save(store, 70, 3.0, at=3)  # resumed from 60
    assert steps_on_disk(tmp_path) == {60, 70}
    assert newest_checkpoint(tmp_path).name == "step-000070"


def test_what_is_just_saved_stays_even_with_a_clock_set_back(tmp_path, save):
    store = CheckpointStore(tmp_path, 1)
    save(store, 10, 1.0, at=500)
    save(store, 20, 2.0, at=3)
    assert 20 in steps_on_disk(tmp_path)


def test_damaged_folders_are_neither_ranked_nor_deleted(tmp_path, save):
    store = CheckpointStore(tmp_path, 1)
    broken = save(store, 10, 0.1).path
    (broken / MANIFEST_NAME).write_text("{")
    (tmp_path / "checkpoints" / "notes").mkdir()
    save(store, 20, 2.0)
    save(store, 30, 1.0)
    assert store.best().step == 30
    assert read_checkpoints(tmp_path).keys() == {30}
    assert broken.exists()


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, keep)


def test_an_empty_or_misnumbered_checkpoint_is_a_fault_of_the_caller(tmp_path, tools):
    store = CheckpointStore(tmp_path, 1)
    with pytest.raises(ValueError, match="0 files"):
        store.save(7, lambda folder: None, lambda files: tools.manifest(files, step=7), 1.0)
    with pytest.raises(ValueError, match="step 7: 1 files, manifest of 8"):
        store.save(7, lambda f: (f / "a").touch(), lambda files: tools.manifest(files, step=8), 1.0)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_publishing_copies_the_best_and_replaces_the_one_before(tmp_path, save, tools):
    store = CheckpointStore(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        store.publish_best()
    save(store, 10, 2.0)
    assert weights(store.publish_best()) == "10"
    save(store, 20, 1.0)
    best = store.publish_best()
    assert best == tmp_path / "best"
    assert weights(best) == "20"
    verify(best)
    # A copy of its own: damage to one is not damage to the other.
    for name in ("adapter_model.safetensors", MANIFEST_NAME):
        assert not (best / name).samefile(tmp_path / "checkpoints/step-000020" / name)
    assert tools.hidden_in(tmp_path) == []


def test_publishing_again_writes_only_where_something_changed(tmp_path, save):
    store = CheckpointStore(tmp_path, 1)
    save(store, 10, 2.0)
    file = store.publish_best() / "adapter_model.safetensors"
    inode = file.stat().st_ino
    store.publish_best()
    assert file.stat().st_ino == inode
    file.write_bytes(b"x" * PAYLOAD)
    store.publish_best()
    assert weights(tmp_path / "best") == "10"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(b"y" * PAYLOAD), "its content is not what was saved"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_best_is_not_published_over_a_good_one(tmp_path, save, damage, says):
    store = CheckpointStore(tmp_path, 1)
    save(store, 10, 2.0)
    store.publish_best()
    bad = save(store, 20, 1.0).path / "adapter_model.safetensors"
    damage(bad)
    with pytest.raises(CheckpointError, match=says) as caught:
        store.publish_best()
    assert caught.value.place == str(bad)
    assert weights(tmp_path / "best") == "10"


def test_a_copy_gone_wrong_is_not_published(tmp_path, save, tools):
    class BadDisk(type(tools.unflushed)):
        def copy_file(self, source, target):
            super().copy_file(source, target)
            if target.name == "adapter_model.safetensors":
                target.write_bytes(target.read_bytes()[::-1])

    store = CheckpointStore(tmp_path, 1, fs=BadDisk())
    save(store, 10, 2.0)
    with pytest.raises(CheckpointError, match=r"best: the copy differs from .*step-000010"):
        store.publish_best()
    assert not (tmp_path / "best").exists()
    assert tools.hidden_in(tmp_path) == []


def save_and_publish(run_dir, save, fs):
    store = CheckpointStore(run_dir, 1, fs=fs)
    save(store, 20, 1.0)
    store.publish_best()


@pytest.fixture
def trained(tmp_path, save, tools):
    """Makes run folders with one published checkpoint, of step 10."""
    store = CheckpointStore(tmp_path / "trained", 1, fs=tools.unflushed)
    save(store, 10, 2.0)
    store.publish_best()
    return lambda name: shutil.copytree(tmp_path / "trained", tmp_path / name)


def check_whole(run_dir, tools):
    """What any new process must find, whatever happened to the one before."""
    store = CheckpointStore(run_dir, 1)
    assert tools.hidden_in(run_dir) == []
    found = read_checkpoints(run_dir)
    assert found.keys() == steps_on_disk(run_dir)
    for path, _ in found.values():
        verify(path)
    verify(run_dir / "best")
    assert weights(run_dir / "best") in ("10", "20")
    assert store.best().step == max(found)
    return set(found), weights(run_dir / "best")


def test_kill_at_every_operation_of_a_save(trained, save, tools):
    seen = []
    for at in range(100):
        run_dir = trained(str(at))
        killed = tools.run_killed(lambda fs, run_dir=run_dir: save_and_publish(run_dir, save, fs), at)
        seen.append(check_whole(run_dir, tools))
        if not killed:
            break
    assert seen[0] == ({10}, "10")
    assert ({10, 20}, "10") in seen  # saved, the old one not yet pruned
    assert seen[-1] == ({20}, "20")


def test_what_a_killed_process_did_not_come_to_prune_goes_when_the_best_is_published(
    tmp_path, save, monkeypatch
):
    store = CheckpointStore(tmp_path, keep=1)
    with monkeypatch.context() as killed_before:
        killed_before.setattr(CheckpointStore, "_prune", lambda *_: None)
        for step, score in ((10, 3.0), (20, 1.0), (30, 2.0)):
            save(store, step, score)
    store.publish_best()
    assert steps_on_disk(tmp_path) == {20, 30}


def test_what_a_failing_disk_did_not_remove_goes_when_the_best_is_published(tmp_path, save, tools):
    class Failing(type(tools.unflushed)):
        fails = True

        def remove(self, path):
            if self.fails:
                tools.broken_disk()
            super().remove(path)

    store = CheckpointStore(tmp_path, keep=1, fs=(fs := Failing()))
    for step, score in ((10, 3.0), (20, 2.0)):
        save(store, step, score)
    assert tools.hidden_in(tmp_path)
    fs.fails = False
    store.publish_best()
    assert tools.hidden_in(tmp_path) == []


@pytest.mark.parametrize("fault", ["no space left on the disk", "could not be saved"])
def test_a_fault_at_every_operation_of_a_save(trained, save, tools, fault):
    outcomes = set()
    for at in range(100):
        run_dir = trained(str(at))
        fs = tools.counted(at, tools.faults[fault])
        try:
            save_and_publish(run_dir, save, fs)
            outcomes.add("went on")  # the fault hit pruning only
        except CheckpointError as error:
            outcomes.add(error.fault.split(" (")[0])
        steps, _ = check_whole(run_dir, tools)
        assert steps  # at least one checkpoint is always there
        if len(fs.log) <= at:
            break
    assert outcomes == {"went on", fault}


def test_space_running_out_tells_how_much_the_last_one_took(tmp_path, save, tools):
    store = CheckpointStore(tmp_path, 1)
    save(store, 10, 2.0)

    def write(folder):
        (folder / "part").write_bytes(b"x" * 10)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match=r"needs 1\.0 kB, has"):
        store.save(20, write, tools.manifest, 1.0)
    assert steps_on_disk(tmp_path) == {10}


TAG = "org/tiny:alice:abcde"


@pytest.fixture
def best(tmp_path, save):
    store = CheckpointStore(tmp_path / "run", 1)
    save(store, 10, 2.0)
    return store.publish_best()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_forwarding_to_a_folder(tmp_path, best, tools, scheme):
    where = forward(best, f"{scheme}{tmp_path}/storage", TAG)
    assert where == str(tmp_path / "storage" / "lora_fine_tuning" / "org" / "tiny:alice:abcde")
    copy = tmp_path / "storage" / "lora_fine_tuning" / TAG
    verify(copy)
    assert read_manifest(copy) == read_manifest(best)
    (copy / "adapter_model.safetensors").write_bytes(b"outdated")
    forward(best, str(tmp_path / "storage"), TAG)
    verify(copy)
    assert tools.hidden_in(tmp_path) == []


def test_forwarding_clears_what_a_killed_process_left_of_this_tag_and_of_no_other(tmp_path, best):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = tmp_path / "lora_fine_tuning"
    mine, other = (folder / f".{name}.tmp-{ended.pid}-0123abcd" for name in ("mine", "other"))
    for left in (mine, other):
        left.mkdir(parents=True)
        (left / "adapter_model.safetensors").write_bytes(b"half")
    forward(best, str(tmp_path), "mine")
    assert not mine.exists()
    assert other.exists()
    verify(folder / "mine")


@pytest.mark.parametrize("tag", ["", "/etc", "../x", "a/../../x", "a//b", "a/", ".", "a\0b"])
def test_a_tag_cannot_lead_out_of_the_storage(tmp_path, best, tag):
    with pytest.raises(OutputError, match="cannot be used as a folder name"):
        forward(best, str(tmp_path / "storage"), tag)
    assert not (tmp_path / "storage").exists()


def test_forwarding_destroys_nothing_that_is_no_checkpoint(tmp_path, best):
    theirs = tmp_path / "lora_fine_tuning" / "org" / "notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(OutputError, match="exists and is no checkpoint"):
        forward(best, str(tmp_path), "org")
    forward(best, str(tmp_path), "org/tiny")
    with pytest.raises(OutputError, match="is itself a forwarded model"):
        forward(best, str(tmp_path), "org/tiny/inner")
    assert theirs.read_text() == "mine"


def test_a_damaged_checkpoint_is_not_forwarded(tmp_path, best):
    (best / "adapter_model.safetensors").write_bytes(b"z" * PAYLOAD)
    for root in (str(tmp_path / "storage"), "memory://damaged"):
        with pytest.raises(CheckpointError, match="its content is not what was saved"):
            forward(best, root, TAG)
    assert not (tmp_path / "storage" / "lora_fine_tuning" / TAG).exists()
    assert not fsspec.filesystem("memory").exists("/damaged")


def test_forwarding_to_a_url(tmp_path, best, tools):
    url = forward(best, "memory://bucket/models/", TAG)
    assert url == f"memory://bucket/models/lora_fine_tuning/{TAG}"
    store = fsspec.filesystem("memory")
    root = f"/bucket/models/lora_fine_tuning/{TAG}"
    store.get(root, str(tmp_path / "fetched"), recursive=True)
    verify(tmp_path / "fetched")

    # The next one under the tag has another set of files: what is only the earlier one's goes.
    (best / "sub" / "adapter_config.json").unlink()
    (best / "sub").rmdir()
    stamps = {"adapter_model.safetensors": read_manifest(best).files["adapter_model.safetensors"]}
    write_manifest(best, tools.manifest(stamps))
    store.pipe_file(f"{root}/theirs.txt", b"not listed, so not ours")
    forward(best, "memory://bucket/models", TAG)
    names = {path.removeprefix(f"{root}/") for path in store.find(root)}
    assert names == {"adapter_model.safetensors", MANIFEST_NAME, "theirs.txt"}


def test_at_a_url_the_manifest_is_there_only_with_all_the_rest(best, monkeypatch):
    store = fsspec.filesystem("memory")
    root = f"/partial/lora_fine_tuning/{TAG}"
    forward(best, "memory://partial", TAG)
    real, left = type(store).put_file, [1]

    def put_file(self, source, target, **options):
        if not left[0]:
            raise ConnectionError("the line is dead")
        left[0] -= 1
        return real(self, source, target, **options)

    monkeypatch.setattr(type(store), "put_file", put_file)
    monkeypatch.setattr("tunesmith.storage.retries.sleep", lambda _: None)
    with pytest.raises(OutputError, match=r"ConnectionError: the line is dead.*it is safe in .*best"):
        forward(best, "memory://partial", TAG)
    assert store.find(root)
    assert not store.exists(f"{root}/{MANIFEST_NAME}")
    left[0] = 100
    forward(best, "memory://partial", TAG)
    listed = json.loads(store.cat_file(f"{root}/{MANIFEST_NAME}"))["files"]
    assert {f"{root}/{name}" for name in listed} <= set(store.find(root))


def test_an_unknown_kind_of_url(best):
    with pytest.raises(OutputError, match=r"^nosuch://bucket/lora_fine_tuning/.*cannot be written"):
        forward(best, "nosuch://bucket", TAG)
