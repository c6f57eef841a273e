"""What a path, folder, glob or URL stands for, and how places that cannot be read are refused."""

import gzip
import hashlib
import os
import socket
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from tunesmith.data.sources import file_digest, read_records, resolve_files
from tunesmith.errors import DataError

ROW = b'{"text": "a"}\n'


def put(path: Path, data: bytes = ROW) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def refusal(path: str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_one_file_of_any_name_is_taken(tmp_path):
    assert resolve_files(put(tmp_path / "rows.txt")) == [str(tmp_path / "rows.txt")]


def test_folder_gives_its_visible_row_files_sorted_and_not_those_below(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", ".hidden.jsonl", "README.md", "c.json", "below/d.jsonl"):
        put(tmp_path / name)
    (tmp_path / "folder.jsonl").mkdir()
    assert resolve_files(str(tmp_path)) == [str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a1.jsonl", "a2.jsonl"]),
        ("a[2-9].jsonl", ["a2.jsonl"]),
        ("a?.jsonl", ["a1.jsonl", "a2.jsonl"]),
        ("**/*.jsonl", ["a1.jsonl", "a2.jsonl", "sub/b.jsonl"]),
        ("*/b.jsonl", ["sub/b.jsonl"]),
        (".h*/*.jsonl", [".hidden/c.jsonl"]),
    ],
)
def test_glob(tmp_path, pattern, expected):
    for name in ("a2.jsonl", "a1.jsonl", "sub/b.jsonl", ".hidden/c.jsonl", ".d.jsonl"):
        put(tmp_path / name)
    assert resolve_files(str(tmp_path / pattern)) == [str(tmp_path / name) for name in expected]


def test_relative_paths_and_globs(tmp_path, monkeypatch):
    put(tmp_path / "data/a.jsonl")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert resolve_files("../data/*.jsonl") == ["../data/a.jsonl"]
    monkeypatch.chdir(tmp_path / "data")
    assert resolve_files("*.jsonl") == resolve_files("./a.jsonl") == resolve_files(".") == ["a.jsonl"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "a.jsonl")
    assert resolve_files("~/a.jsonl") == [str(tmp_path / "a.jsonl")]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    put(tmp_path / "a1.jsonl")
    assert resolve_files(put(tmp_path / "a[1].jsonl")) == [str(tmp_path / "a[1].jsonl")]


def test_file_url_is_a_local_path(tmp_path):
    assert resolve_files(f"file://{put(tmp_path / 'a.jsonl')}") == [str(tmp_path / "a.jsonl")]


def test_link_to_a_file_is_followed(tmp_path):
    put(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    assert [row.text for row in read_records(str(tmp_path / "b.jsonl"))] == ['{"text": "a"}']


def test_recursive_glob_ends_where_folders_link_in_a_loop(tmp_path):
    put(tmp_path / "sub/a.jsonl")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    (tmp_path / "sub/again").symlink_to(tmp_path / "sub")
    assert resolve_files(str(tmp_path / "**/*.jsonl")) == [str(tmp_path / "sub/a.jsonl")]


def test_missing_file_names_the_nearest_one(tmp_path):
    put(tmp_path / "train.jsonl")
    put(tmp_path / "valid.jsonl")
    with pytest.raises(DataError, match=r"trian\.jsonl: does not exist; closest there is train\.jsonl$"):
        resolve_files(str(tmp_path / "trian.jsonl"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("zzz", "zzz: does not exist; check the path"),
        ("no/such/a.jsonl", "does not exist; nor is there a folder"),
        ("file.txt/a.jsonl", "does not exist; nor is there a folder"),
        ("x*.jsonl", "x*.jsonl: matches no file; check the path"),
        ("a**b/*.jsonl", "is not a usable glob"),
        ("empty", "empty: has no *.jsonl or *.jsonl.gz files"),
        ("loop.jsonl", "loop.jsonl: its symbolic links form a loop"),
        ("dead.jsonl", "dead.jsonl: is a link to a file that does not exist"),
        ("dea*.jsonl", "dead.jsonl: is a link to a file that does not exist"),
        ("pipe.jsonl", "pipe.jsonl: is a pipe, socket or device"),
        ("socket", "socket: is a pipe, socket or device"),
        ("pi*", "pipe.jsonl: is a pipe, socket or device"),
        ("nul\0.jsonl", "nul\\x00.jsonl: cannot be read (embedded null byte"),
        ("line\nbreak.jsonl", "line\\nbreak.jsonl: does not exist"),
        ("n" * 300, "cannot be read (File name too long)"),
    ],
)
def test_refused_places(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    put(Path("file.txt"))
    Path("empty").mkdir()
    Path("loop.jsonl").symlink_to("loop.jsonl")
    Path("dead.jsonl").symlink_to("gone")
    os.mkfifo("pipe.jsonl")  # reading it would hang for ever
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert says in refusal(name)
        with pytest.raises(DataError):
            file_digest(name)


def test_folder_with_a_pipe_among_its_files_is_refused(tmp_path):
    put(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    assert "b.jsonl: is a pipe" in refusal(str(tmp_path))


def test_device_and_empty_path_are_refused():
    assert "device" in refusal("/dev/zero")
    assert "the path is empty" in refusal(" ")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX users")
def test_missing_rights(tmp_path):
    secret = Path(put(tmp_path / "secret.jsonl"))
    folder = Path(put(tmp_path / "folder/a.jsonl")).parent
    secret.chmod(0)
    folder.chmod(0)
    reachable, modes = [tmp_path, *tmp_path.parents], {}
    is_root = os.geteuid() == 0
    if is_root:  # root reads everything: be somebody else for a moment
        for parent in reachable:
            if not parent.stat().st_mode & 0o001:
                modes[parent] = parent.stat().st_mode
                parent.chmod(0o755)
        os.seteuid(65534)
    try:
        assert "secret.jsonl: permission denied; give" in refusal(str(secret))
        assert "folder: permission denied" in refusal(str(folder))
        assert "a.jsonl: permission denied" in refusal(str(folder / "a.jsonl"))
    finally:
        if is_root:
            os.seteuid(0)
        for parent, mode in modes.items():
            parent.chmod(mode & 0o7777)
        folder.chmod(0o755)


# --- URLs


@pytest.fixture
def store():
    memory = fsspec.filesystem("memory")
    root = f"/{uuid4().hex}"
    for name in ("b.jsonl", "a.jsonl.gz", "notes.txt", ".h.jsonl"):
        memory.pipe(f"{root}/{name}", gzip.compress(ROW) if name.endswith("gz") else ROW * 2)
    yield f"memory://{root}"
    memory.rm(root, recursive=True)


def test_url_of_file_folder_and_glob(store):
    both = [f"{store}/a.jsonl.gz", f"{store}/b.jsonl"]
    assert resolve_files(store) == resolve_files(f"{store}/[ab].jsonl*") == both
    assert resolve_files(f"{store}/notes.txt") == [f"{store}/notes.txt"]
    rows = list(read_records(store))
    assert [(row.file, row.line) for row in rows] == [(both[0], 1), (both[1], 1), (both[1], 2)]
    assert file_digest(f"{store}/b.jsonl") == hashlib.sha256(ROW * 2).hexdigest()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/c.jsonl", "/c.jsonl: does not exist; closest there is b.jsonl"),
        ("/z*.jsonl", "matches no file"),
        ("/none/at/all", "does not exist; check the path"),
    ],
)
def test_refused_urls(store, name, says):
    assert says in refusal(store + name)


def test_url_of_an_unknown_or_uninstalled_kind():
    assert "nosuch://bucket/a.jsonl: no store is known by nosuch://" in refusal("nosuch://bucket/a.jsonl")
