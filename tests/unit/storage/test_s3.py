"""Against a real S3 server on loopback: files, folders, torn lines, busy servers, credentials."""

import hashlib
import os

import pytest

from store_parts import environment, fresh_clients, line_to, s3_server
from tunesmith.data.sources import file_digest, read_records, resolve_files
from tunesmith.errors import ConfigError, DataError, OutputError
from tunesmith.storage import blocks
from tunesmith.storage.blocks import download
from tunesmith.storage.places import list_files, look, open_place, read, remove, upload

pytest.importorskip("s3fs")
pytest.importorskip("moto")

MIB = 2**20
ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(scope="module")
def server():
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def shared_line(server):
    """The environment says where and who."""
    with line_to(*server) as line, pytest.MonkeyPatch.context() as patch, fresh_clients():
        for name, value in environment(line.url).items():
            patch.setenv(name, value)
        yield line


@pytest.fixture
def line(shared_line):
    """A line to the server, whole at first."""
    yield shared_line
    shared_line.heal()
    shared_line.hang_up()


@pytest.fixture
def bucket(line):
    name = f"b{os.urandom(6).hex()}"
    open_place(f"s3://{name}", OutputError).fs.mkdir(name)
    return f"s3://{name}"


def put(url, content):
    place = open_place(url, OutputError)
    place.fs.pipe_file(place.path, content)


def place(url):
    return open_place(url, DataError)


def fault(call, *arguments):
    with pytest.raises((DataError, OutputError, ConfigError)) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text.isprintable()
    assert "testing-secret" not in text
    return text


def test_files_are_written_looked_at_listed_read_and_removed(bucket, tmp_path):
    (tmp_path / "x").write_bytes(b"one")
    for name in ("f/x", "f/sub/y", "f-other/z"):
        upload(tmp_path / "x", open_place(f"{bucket}/{name}", OutputError))
    found = look(place(f"{bucket}/f/x"))
    assert (found.size, found.is_folder) == (3, False)
    assert hashlib.md5(b"one").hexdigest() in found.tag
    assert look(place(f"{bucket}/f")).is_folder
    assert look(place(f"{bucket}/f/none")) is None
    assert list(list_files(place(f"{bucket}/f"))) == list(list_files(place(f"{bucket}/f/"))) == ["sub/y", "x"]
    assert list_files(place(f"{bucket}/none")) == {}
    assert read(place(f"{bucket}/f/x")) == b"one"
    for _ in range(2):
        remove(place(f"{bucket}/f/x"))
        assert look(place(f"{bucket}/f/x")) is None


def test_what_another_writes_is_seen_at_once(bucket):
    folder = place(f"{bucket}/f")
    assert list_files(folder) == {}
    put(f"{bucket}/f/x", b"1")
    first = list_files(folder)["x"]
    put(f"{bucket}/f/x", b"2")
    assert list_files(folder)["x"].tag != first.tag
    assert look(folder.below("x")).tag == list_files(folder)["x"].tag


def test_keys_that_lead_out_of_the_folder_are_left_out(bucket):
    store = place(bucket).fs
    name = bucket.removeprefix("s3://")
    for key in ("f/good", "f/../../evil", "f//double", "f/marker/"):
        store.call_s3("put_object", Bucket=name, Key=key, Body=b"x")
    assert list(list_files(place(f"{bucket}/f"))) == ["good"]


@pytest.mark.parametrize("size", [0, 1, 99_999, 100_000, 100_001, 350_000])
def test_downloads_of_any_number_of_blocks(bucket, tmp_path, monkeypatch, size):
    monkeypatch.setattr(blocks, "BLOCK", 100_000)
    content = os.urandom(size)
    put(f"{bucket}/x", content)
    download(place(f"{bucket}/x"), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_download_outlasts_a_line_that_breaks_again_and_again(bucket, line, tmp_path, monkeypatch, waits):
    monkeypatch.setattr(blocks, "BLOCK", MIB)
    content = os.urandom(6 * MIB + 17)
    put(f"{bucket}/x", content)
    line.cut(times=6, after=300_000)
    download(place(f"{bucket}/x"), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content
    assert line.cuts == 0


def test_a_line_that_stays_broken_is_told_and_leaves_nothing(bucket, line, tmp_path, waits):
    put(f"{bucket}/x", os.urandom(MIB))
    line.cut(times=10_000, after=200_000)
    text = fault(download, place(f"{bucket}/x"), tmp_path / "x")
    assert text.startswith(f"{bucket}/x: cannot be reached (")
    assert list(tmp_path.iterdir()) == []
    assert len(waits) >= 4


def test_a_busy_server_is_asked_again(bucket, line, tmp_path):
    put(f"{bucket}/x", b"content")
    line.turn_away(3)
    assert read(place(f"{bucket}/x")) == b"content"
    assert line.busy == 0


def test_a_dead_server_is_told_within_bounds(bucket, line, waits):
    line.is_down = True
    line.hang_up()
    before = line.seen
    text = fault(look, place(f"{bucket}/x"))
    assert "cannot be reached" in text
    assert line.seen - before <= 30
    assert sum(waits) <= 7.5


def test_an_upload_outlasts_broken_lines_and_appears_whole(bucket, line, tmp_path):
    content = os.urandom(3 * MIB)
    (tmp_path / "x").write_bytes(content)
    line.cut(times=3, after=MIB, way="up")
    upload(tmp_path / "x", open_place(f"{bucket}/x", OutputError))
    assert line.cuts == 0
    line.heal()
    assert read(place(f"{bucket}/x")) == content


def test_an_upload_that_cannot_end_leaves_the_old_object(bucket, line, tmp_path):
    put(f"{bucket}/x", b"old")
    (tmp_path / "x").write_bytes(os.urandom(MIB))
    line.cut(times=10_000, after=200_000, way="up")
    text = fault(upload, tmp_path / "x", open_place(f"{bucket}/x", OutputError))
    assert "cannot be reached" in text
    line.heal()
    line.hang_up()
    assert read(place(f"{bucket}/x")) == b"old"


def test_a_large_upload_goes_in_parts_and_comes_back_whole(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 * MIB)
    content = os.urandom(11 * MIB)
    (tmp_path / "x").write_bytes(content)
    upload(tmp_path / "x", open_place(f"{bucket}/x", OutputError))
    assert "-" in look(place(f"{bucket}/x")).tag  # an ETag that is no MD5
    download(place(f"{bucket}/x"), tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == content


def test_an_object_replaced_while_it_is_fetched_is_fetched_anew(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    put(f"{bucket}/x", b"a" * 5000)
    real, calls = blocks._block, []

    def replaced_once(file, start, end):
        calls.append(start)
        if len(calls) == 3:
            put(f"{bucket}/x", b"b" * 5000)
        return real(file, start, end)

    monkeypatch.setattr(blocks, "_block", replaced_once)
    download(place(f"{bucket}/x"), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"b" * 5000


def test_content_that_is_not_what_the_etag_says_is_refused(bucket, tmp_path, monkeypatch):
    put(f"{bucket}/x", b"a" * 5000)
    monkeypatch.setattr(blocks, "_block", lambda file, start, end: b"b" * (end - start))
    assert "what came has MD5" in fault(download, place(f"{bucket}/x"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_name_with_bucket_in_it_is_no_missing_bucket(bucket):
    assert look(place(f"{bucket}/the bucket/none")) is None
    assert list_files(place(f"{bucket}/bucket")) == {}


def test_missing_things_are_named(bucket, tmp_path):
    assert (
        fault(download, place(f"{bucket}/no"), tmp_path / "x") == f"{bucket}/no: not found; check the address"
    )
    nowhere = "s3://no-such-bucket-here/x"
    assert fault(look, place(nowhere)).startswith(f"{nowhere}: there is no such bucket; check its name")
    assert "there is no such bucket" in fault(list_files, place(nowhere))
    (tmp_path / "x").write_bytes(b"x")
    assert "there is no such bucket" in fault(upload, tmp_path / "x", open_place(nowhere, OutputError))


def test_missing_credentials_are_named_and_not_asked_for_again(bucket, line, monkeypatch, tmp_path, waits):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with fresh_clients():
        text = fault(look, place(f"{bucket}/x"))
    assert text == (
        f"{bucket}/x: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
    )
    assert waits == []


# --- rows


def test_rows_of_files_folders_and_globs(bucket):
    for name in ("d/b.jsonl", "d/a.jsonl", "d/notes.txt", "d/.hidden.jsonl"):
        put(f"{bucket}/{name}", ROW * 3)
    both = [f"{bucket}/d/a.jsonl", f"{bucket}/d/b.jsonl"]
    assert resolve_files(f"{bucket}/d") == resolve_files(f"{bucket}/d/[ab].jsonl") == both
    assert [(row.file, row.line) for row in read_records(f"{bucket}/d")] == [
        (f, n) for f in both for n in (1, 2, 3)
    ]
    assert file_digest(both[0]) == hashlib.sha256(ROW * 3).hexdigest()
    assert "closest there is a.jsonl" in fault(resolve_files, f"{bucket}/d/A.jsonl")
    assert "matches no file" in fault(resolve_files, f"{bucket}/d/z*.jsonl")
    assert "there is no such bucket" in fault(resolve_files, "s3://no-such-bucket-here/d/x.jsonl")


def test_rows_outlast_a_line_that_breaks(bucket, line, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 100_000)
    put(f"{bucket}/x.jsonl", ROW * 10_000)
    line.cut(times=5, after=60_000)
    rows = list(read_records(f"{bucket}/x.jsonl", hashlib.sha256(ROW * 10_000).hexdigest()))
    assert len(rows) == 10_000
    assert line.cuts == 0


def test_rows_of_a_line_that_stays_broken_end_in_an_error(bucket, line, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 100_000)
    put(f"{bucket}/x.jsonl", ROW * 10_000)
    rows = read_records(f"{bucket}/x.jsonl")
    assert next(rows).line == 1
    line.cut(times=10_000, after=30_000)
    assert "x.jsonl: cannot be reached" in fault(list, rows)


def test_rows_that_change_while_they_are_read_are_refused(bucket, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    put(f"{bucket}/x.jsonl", ROW * 100)
    rows = read_records(f"{bucket}/x.jsonl")
    next(rows)
    put(f"{bucket}/x.jsonl", ROW * 200)
    assert "was changed while it was read" in fault(list, rows)
