import errno
import json
import os
import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tunesmith.checkpoints.atomic import (
    FileOps,
    remove_folder,
    remove_leftovers,
    whole_folder,
    write_json,
    write_text,
)
from tunesmith.checkpoints.disk_errors import human_bytes
from tunesmith.errors import CheckpointError, OutputError

OLD = {"a.txt": "old a", "only-old.txt": "x"}
NEW = {"a.txt": "new a", "deep/b.txt": "new b"}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str] | None:
    if not folder.exists():
        return None
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def write_new(final: Path, replace: bool, fs: FileOps) -> None:
    with whole_folder(final, replace=replace, fs=fs) as folder:
        fill(folder, NEW)


def changes_of(final: Path, replace: bool, tools) -> int:
    fs = tools.counted()
    write_new(final, replace, fs)
    return len(fs.log)


@pytest.fixture
def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def test_text_is_written_in_utf8_and_replaces_what_was_there(tmp_path, tools):
    path = tmp_path / "new" / "folders" / "note.txt"
    write_text(path, "first, much longer")
    write_text(path, "zwölf €")
    assert path.read_bytes() == b"zw\xc3\xb6lf \xe2\x82\xac"
    assert tools.hidden_in(tmp_path) == []


def test_json_has_no_nan_and_survives_half_a_surrogate_pair(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"loss": float("nan"), "ppl": [float("inf"), 2.5], "text": "\ud800é", "at": Path("a/b")})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads(path.read_bytes(), parse_constant=refuse)
    assert read == {"loss": None, "ppl": [None, 2.5], "text": "\ud800é", "at": "a/b"}


def test_json_of_ordinary_text_stays_readable(tmp_path):
    write_json(tmp_path / "x.json", {"name": "Zoë"})
    assert "Zoë" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_folder_appears_whole_and_flushed_before_it_gets_its_name(tmp_path, tools):
    fs = tools.counted()
    final = tmp_path / "runs" / "step"
    with whole_folder(final, fs=fs) as folder:
        assert folder.parent == final.parent
        assert folder.name.startswith(f".step.tmp-{os.getpid()}-")
        fill(folder, NEW)
        assert not final.exists()
    assert content(final) == NEW
    renamed_at = [name for name, _ in fs.log].index("rename")
    flushed = {path for name, path in fs.log[:renamed_at] if name == "fsync"}
    assert {folder, folder / "a.txt", folder / "deep", folder / "deep/b.txt"} <= flushed
    assert fs.log[renamed_at + 1 :] == [("fsync", final.parent)]


@pytest.mark.parametrize("there", [{}, OLD])
def test_an_existing_folder_is_refused_before_any_work(tmp_path, there):
    final = tmp_path / "step"
    final.mkdir()
    fill(final, there)
    with pytest.raises(OutputError, match=r"step: exists already; "), whole_folder(final):
        pytest.fail("the body must not run")
    assert content(final) == there


def test_a_folder_that_came_meanwhile_is_not_overwritten(tmp_path, tools):
    final = tmp_path / "step"

    def race() -> None:
        with whole_folder(final):
            final.mkdir()

    with pytest.raises(OutputError, match="exists already"):
        race()
    assert content(final) == {}
    assert tools.hidden_in(tmp_path) == []


def test_two_processes_that_put_a_folder_in_one_place_do_not_collide(tmp_path, tools):
    final, fs = tmp_path / "step", tools.unflushed
    final.mkdir()

    def both(number: int) -> None:
        for _ in range(100):
            with whole_folder(final, replace=True, fs=fs) as folder:
                fill(folder, {name: str(number) for name in NEW})

    children = []
    for number in (1, 2):
        pid = os.fork()
        if pid == 0:
            try:
                both(number)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert content(final) in ({name: str(number) for name in NEW} for number in (1, 2))
    assert tools.hidden_in(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_other_errors_pass_unchanged_and_leave_nothing(tmp_path, tools, error):
    final = tmp_path / "step"
    final.mkdir()
    fill(final, OLD)

    def fail() -> None:
        with whole_folder(final, replace=True) as folder:
            fill(folder, NEW)
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert content(final) == OLD
    assert tools.hidden_in(tmp_path) == []


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("fault", ["no space left on the disk", "could not be saved"])
def test_a_fault_at_every_operation_leaves_the_old_or_the_new_whole(tmp_path, tools, replace, once, fault):
    before = OLD if replace else None

    def prepared(name: str) -> Path:
        final = tmp_path / name / "step"
        final.parent.mkdir()
        if replace:
            final.mkdir()
            fill(final, OLD)
        return final

    count = changes_of(prepared("counted"), replace, tools)
    # Folder made, 4 flushes in it, rename, flush of the parent; the old one moved and removed.
    assert count == (9 if replace else 7)
    for at in range(count):
        final = prepared(f"fault-{at}")
        fs = tools.counted(at, tools.faults[fault], once=once)
        removing_old = replace and at == count - 1
        if removing_old:
            write_new(final, replace, fs)  # the new one is in place; that is success
        else:
            with pytest.raises(CheckpointError, match=rf"step: {fault} \("):
                write_new(final, replace, fs)
        if once and not removing_old:
            assert tools.hidden_in(final.parent) == []
            assert content(final) == before
        remove_leftovers(final.parent)  # as the next process does where even undoing was impossible
        assert tools.hidden_in(final.parent) == []
        allowed = [NEW] if removing_old else [before] if once else [before, NEW]
        assert content(final) in allowed


@pytest.mark.parametrize("replace", [False, True])
def test_kill_at_every_operation_leaves_the_old_or_the_new_whole(tmp_path, tools, replace):
    final = tmp_path / "step"
    outcomes = []
    for at in range(100):
        remove_folder(final) if final.exists() else None
        if replace:
            final.mkdir()
            fill(final, OLD)
        killed = tools.run_killed(lambda fs: write_new(final, replace, fs), at)
        remove_leftovers(tmp_path)
        assert tools.hidden_in(tmp_path) == []
        assert content(final) in ((OLD, NEW) if replace else (None, NEW))
        outcomes.append(content(final) == NEW)
        if not killed:
            break
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False
    assert outcomes[-1] is True


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.ENOSPC, CheckpointError, "no space left on the disk (needs 5.0 MB, has "),
        (errno.EDQUOT, CheckpointError, "no space left on the disk: your quota is used up (needs 5.0 MB"),
        (errno.EACCES, OutputError, "cannot be written (Permission denied)"),
        (errno.EROFS, OutputError, "cannot be written (Read-only file system)"),
        (errno.EIO, CheckpointError, "could not be saved (Input/output error)"),
    ],
)
def test_system_errors_become_errors_with_place_and_remedy(tmp_path, number, kind, says):
    final = tmp_path / "step"
    with pytest.raises(kind) as caught, whole_folder(final, needs=5_000_000) as folder:
        raise OSError(number, os.strerror(number), str(folder / "model.safetensors"))
    assert str(caught.value).startswith(f"{final}: {says}")
    assert caught.value.remedy


def test_error_about_a_file_elsewhere_names_that_file(tmp_path):
    with (
        pytest.raises(OutputError, match=r"^/base/model\.json: "),
        whole_folder(tmp_path / "runs" / "step"),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "/base/model.json")


def test_full_device_is_reported_and_the_old_text_stays(tmp_path, tools):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")

    class FullDevice(FileOps):
        def write_bytes(self, path: Path, data: bytes) -> None:
            path.touch()
            Path("/dev/full").write_bytes(data)

    path = tmp_path / "report.json"
    write_text(path, "old")
    with pytest.raises(
        CheckpointError, match=r"no space left on the disk \(needs 3 bytes, has [\d.]+ .B free\)"
    ):
        write_text(path, "new", fs=FullDevice())
    assert path.read_text() == "old"
    assert tools.hidden_in(tmp_path) == []


def test_limit_on_file_size_is_reported_as_such(tmp_path, tools):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    final = tmp_path / "step"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with (
            pytest.raises(CheckpointError, match="larger than this process") as caught,
            whole_folder(final) as folder,
        ):
            (folder / "weights").write_bytes(bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_full_disk_met_by_safetensors(small_disk, tools):
    """Its Rust writer raises no OSError; the disk's fault must be recognised all the same."""
    final = small_disk / "step"
    with whole_folder(final) as folder:
        save_file({"a": np.ones(1000, np.float32)}, folder / "model.safetensors")
    before = content_bytes(final)
    with (
        pytest.raises(
            CheckpointError, match=r"no space left on the disk \(needs 4\.0 MB, has 2\d\d\.\d kB free"
        ),
        whole_folder(final, replace=True, needs=4_000_000) as folder,
    ):
        save_file({"a": np.ones(1_000_000, np.float32)}, folder / "model.safetensors")
    assert content_bytes(final) == before
    assert tools.hidden_in(small_disk) == []


def test_full_disk_met_by_a_text_file_inside_a_folder(small_disk, tools):
    final = small_disk / "step"

    def save() -> None:
        with whole_folder(final) as folder:
            (folder / "weights").write_bytes(bytes(200_000))
            write_text(folder / "tunesmith.json", "x" * 100_000)

    with pytest.raises(CheckpointError) as caught:
        save()
    # The folder is the place, not the file under its temporary name.
    assert caught.value.place == str(final)
    assert "needs more than 200.0 kB, has 2" in caught.value.fault
    assert list(small_disk.iterdir()) == []


def test_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="Read-only file system"), whole_folder(small_disk / "a" / "step"):
        pytest.fail("the body must not run")
    with pytest.raises(OutputError, match=r"report\.json: cannot be written"):
        write_text(small_disk / "report.json", "x")


def test_a_folder_of_someone_else(as_ordinary_user):
    os.seteuid(65534)
    with pytest.raises(OutputError, match=r"step: cannot be written \(Permission denied\); give write"):
        write_new(as_ordinary_user / "step", False, FileOps())


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="Not a directory"):
        write_text(tmp_path / "file" / "report.json", "x")


def content_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, dead_pid):
    names = {
        f".step.tmp-{dead_pid}-00000001": False,
        f".report.json.tmp-{dead_pid}-00000002": False,
        f".step.tmp-{os.getppid()}-00000003": True,  # lives
        f".step.tmp-{os.getpid()}-00000004": False,  # our pid, but nothing we are writing
        ".step.tmp-99999999999999999999-00000005": False,
        ".git": True,
        ".step.tmp-notes": True,
        "step.tmp-1-00000006": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    with whole_folder(tmp_path / "mine") as folder:
        remove_leftovers(tmp_path)
        assert folder.exists()
    expected = {name for name, stays in names.items() if stays} | {"mine"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    remove_leftovers(tmp_path / "no such folder")


def test_a_replaced_folder_is_put_back_only_where_it_is_missing(tmp_path, dead_pid):
    for name, text in [
        (f".lost.old-{dead_pid}-00000001", "lost"),
        (f".kept.old-{dead_pid}-00000001", "older"),
    ]:
        fill(tmp_path / name, {"f": text})
    fill(tmp_path / "kept", {"f": "newer"})
    remove_leftovers(tmp_path)
    assert content(tmp_path) == {"lost/f": "lost", "kept/f": "newer"}


def test_removal_never_leaves_half_a_folder_under_its_name(tmp_path, tools):
    folder = tmp_path / "step"
    fill(folder, OLD)
    with pytest.raises(OSError, match="No space"):
        remove_folder(folder, fs=tools.counted(0, tools.no_space))
    assert content(folder) == OLD
    fs = tools.counted(1, tools.no_space)  # moved aside, then not removed
    remove_folder(folder, fs=fs)
    assert [name for name, _ in fs.log] == ["rename", "remove"]
    assert not folder.exists()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_999, "1.0 MB"),
        (12_300_000, "12.3 MB"),
        (16_060_522_240, "16.1 GB"),
        (5 * 10**12, "5.0 TB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_byte_counts_for_people(count, text):
    assert human_bytes(count) == text
