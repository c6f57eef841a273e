"""The exam of bad files: what is no file, no text, no end; what changes while it is read; what is far too large."""

import gzip
import io
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tiny_models
from chat_rows import CALL, A, C, S, T, U, chat
from exam.reading import FAMILY, GOOD, answers_of, lines_of, put, read, refusal, refused_for_good
from flow_parts import refused, settings_for, write_config
from tiny_chats import renderer_of
from tunesmith.data import sources
from tunesmith.data.lengths import fit_to_length
from tunesmith.data.locations import open_file
from tunesmith.data.rendering import TrainOn
from tunesmith.data.rows import TokenizedRows, tokenize_rows
from tunesmith.data.sources import file_digest
from tunesmith.data.watched_file import CHANGED, RUN_AGAIN, WatchedFile, open_regular
from tunesmith.errors import DataError

ROWS = (GOOD + b"\n") * 3
MB = 2**20


# --- no file, or one that is no text


def pipe(path: Path) -> None:
    os.mkfifo(path)  # without a writer: opening it would wait for ever


def loop(path: Path) -> None:
    path.symlink_to(path.with_name("there"))
    path.with_name("there").symlink_to(path)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "rows.json").write_bytes(ROWS)
    (path / ".hidden.jsonl").write_bytes(ROWS)


def written(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


PACKED = gzip.compress(ROWS)
TEXT = ROWS.decode()
FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "absent": ("rows.jsonl", lambda path: None, "does not exist; check the path"),
    "absent in an absent folder": ("no/rows.jsonl", lambda path: None, "does not exist; nor is there a folder"),
    "a loop of links": ("rows.jsonl", loop, "its symbolic links form a loop"),
    "a dead link": ("rows.jsonl", lambda path: path.symlink_to("gone"), "is a link to a file that does not exist"),
    "a pipe": ("rows.jsonl", pipe, "is a pipe, socket or device; name a regular file"),
    "a folder without rows": ("rows", folder, "has no *.jsonl or *.jsonl.gz files"),
    "a folder with a pipe": (
        "rows",
        lambda path: (path.mkdir(), (path / "a.jsonl").write_bytes(ROWS), pipe(path / "b.jsonl")),
        "is a pipe, socket or device",
    ),
    "a glob that matches nothing": ("*.json", lambda path: None, "matches no file"),
    "a file below a file": ("a/b.jsonl", lambda path: path.parent.write_bytes(ROWS), "does not exist"),
    "a very long name": ("n" * 5000, lambda path: None, "cannot be read (File name too long)"),
    "a very long path": ("n/" * 5000 + "rows.jsonl", lambda path: None, "cannot be read (File name too long)"),
    "a null character in the path": ("rows\0.jsonl", lambda path: None, "cannot be read (embedded null byte)"),
    "half a surrogate pair in the path": ("\ud800.jsonl", lambda path: None, "cannot be read ("),
    "empty": ("rows.jsonl", written(b""), "has no rows; write one JSON object a line"),
    "only a byte order mark": ("rows.jsonl", written(b"\xef\xbb\xbf"), "has no rows"),
    "only blank lines": ("rows.jsonl", written(b"\n \r\n\t\n"), "has no rows"),
    "UTF-16 with its mark": ("rows.jsonl", written(TEXT.encode("utf-16")), "is UTF-16 or UTF-32 text; save it as"),
    "UTF-16 without": ("rows.jsonl", written(TEXT.encode("utf-16-le")), "is UTF-16 or UTF-32 text"),
    "UTF-16, big end first": ("rows.jsonl", written(TEXT.encode("utf-16-be")), "is UTF-16 or UTF-32 text"),
    "UTF-32 with its mark": ("rows.jsonl", written(TEXT.encode("utf-32")), "is UTF-16 or UTF-32 text"),
    "UTF-32, big end first": ("rows.jsonl", written(TEXT.encode("utf-32-be")), "is UTF-16 or UTF-32 text"),
    "UTF-16 in gzip": ("rows.jsonl", written(gzip.compress(TEXT.encode("utf-16"))), "is UTF-16 or UTF-32 text"),
    "gzip without its end": ("rows.jsonl.gz", written(PACKED[:-4]), "gzip data is truncated or damaged after"),
    "gzip cut in half": ("rows.jsonl", written(PACKED[: len(PACKED) // 2]), "gzip data is truncated or damaged after"),
    "gzip with garbage behind": ("rows.jsonl.gz", written(PACKED + b"?"), "gzip data is truncated or damaged after"),
    "gzip with another checksum": (
        "rows.jsonl.gz",
        written(PACKED[:-8] + bytes(4) + PACKED[-4:]),
        "gzip data is truncated or damaged after",
    ),
    "gzip with a way of packing unknown": (
        "rows.jsonl.gz",
        written(PACKED[:2] + b"\x63" + PACKED[3:]),
        "gzip data is truncated or damaged after 0 bytes",
    ),
    "a plain file named .gz": ("rows.jsonl.gz", written(ROWS), "is named .gz but is not gzip; rename it"),
    "nothing named .gz": ("rows.jsonl.gz", written(b""), "is named .gz but is empty, which gzip never is"),
    "Parquet": ("rows.jsonl", written(b"PAR1\x15\x04"), "is a Parquet file; convert it to JSONL"),
    "zip": ("rows.jsonl", written(b"PK\x03\x04\x14"), "is a zip file"),
    "zstd": ("rows.jsonl", written(b"\x28\xb5\x2f\xfd\x04"), "is a zstd file"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "make", "says"), FILES.values(), ids=FILES)
def test_refused(tmp_path, name, make, says):
    make(tmp_path / name)
    message = refused_for_good(tmp_path / name)
    assert says in message
    assert message.startswith(str(tmp_path)[:20])


@pytest.mark.parametrize("place", ["/dev/null", "/dev/zero", "/dev/full", "/dev/tty"])
def test_devices(place):
    if not Path(place).exists():
        pytest.skip("there is none here")
    assert refused_for_good(place) == f"{place}: is a pipe, socket or device; name a regular file"


def test_virtual_files_that_have_text_but_no_size():
    if not Path("/proc/version").exists():
        pytest.skip("there is none here")
    assert "/proc/version:1: not JSON at column 1" in refusal("/proc/version")


def test_a_bad_file_spoils_the_others_and_an_empty_one_does_not(tmp_path):
    put(tmp_path / "a.jsonl", ROWS)
    put(tmp_path / "b.jsonl", b"")
    put(tmp_path / "c.jsonl", gzip.compress(ROWS))
    rows = read(tmp_path)
    assert [Path(rows.origin(i)).name for i in range(6)] == [
        "a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "c.jsonl:1", "c.jsonl:2", "c.jsonl:3",
    ]  # fmt: skip
    put(tmp_path / "d.jsonl.gz", b"")
    assert f"{tmp_path / 'd.jsonl.gz'}: is named .gz but is empty" in refused_for_good(tmp_path)


def test_what_a_glob_passes_on_its_way_does_no_harm(tmp_path):
    for name in ("a", ".hidden"):
        (tmp_path / name).mkdir()
        put(tmp_path / name / "rows.jsonl", ROWS)
    loop(tmp_path / "b")
    (tmp_path / "c").symlink_to("gone")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for pattern in ("*/rows.jsonl", "**/*.jsonl", "*/r*"):
        assert lines_of(read(tmp_path / pattern)) == [1, 2, 3]


def test_gzip_of_gzip_is_no_text(tmp_path):
    path = put(tmp_path / "rows.jsonl.gz", gzip.compress(gzip.compress(ROWS)))
    assert f"{path}:1: invalid UTF-8 at byte 1 of the file" in refusal(path)


def test_zeros_behind_gzip_are_padding(tmp_path):
    assert lines_of(read(put(tmp_path / "rows.jsonl.gz", PACKED + bytes(1000)))) == [1, 2, 3]


def test_a_name_with_a_line_break_stays_in_one_line(tmp_path):
    path = put(tmp_path / "a\nb.jsonl", b"{")
    assert refusal(path).split("\n")[1].startswith(f"  {tmp_path}/a\\nb.jsonl:1: JSON is incomplete")


def test_a_user_without_a_home_folder(monkeypatch):
    def without_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")  # as pathlib has it

    monkeypatch.setattr(Path, "expanduser", without_home)
    assert refused_for_good("~/rows.jsonl") == "~/rows.jsonl: has no home folder here; write the path in full"


def test_a_long_row_in_a_file_whose_name_is_not_printable(tmp_path):
    rows = read(put(tmp_path / "a\nb.jsonl", ROWS))
    with pytest.raises(DataError) as caught:
        fit_to_length(rows, 5, "error")
    assert str(caught.value).startswith(f"{tmp_path}/a\\nb.jsonl:1: 3 of 3 rows exceed context_length 5")


@contextmanager
def somebody_else(*reachable: Path) -> Iterator[None]:
    """Root reads everything: be a user without rights for a moment."""
    if os.geteuid() != 0:
        yield
        return
    modes = {parent: parent.stat().st_mode & 0o7777 for parent in reachable}
    for parent, mode in modes.items():
        parent.chmod(mode | 0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in modes.items():
            parent.chmod(mode)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX users")
@pytest.mark.parametrize("rights", [0o000, 0o444, 0o111])
def test_no_rights(tmp_path, rights):
    read(put(tmp_path / "open.jsonl", ROWS))  # what is loaded late is loaded while everything can be read
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        put(tmp_path / name / "rows.jsonl", ROWS)
    secret, closed = put(tmp_path / "secret.jsonl", ROWS), tmp_path / "closed"
    secret.chmod(0)
    closed.chmod(rights)
    try:
        with somebody_else(tmp_path, *tmp_path.parents):
            assert refused_for_good(secret) == (
                f"{secret}: permission denied; give this user the right to read it"
            )
            # pathlib's glob would pass over the closed folder, and its rows would be lost in silence.
            for pattern in ("*/rows.jsonl", "**/*.jsonl", "*/*.jsonl"):
                assert "closed: permission denied" in refused_for_good(tmp_path / pattern)
            assert len(read(tmp_path / "o*/*.jsonl")) == 3
    finally:
        closed.chmod(0o755)


# --- what changes while it is read

# 6 MB: 4 of them are read before the first 512 rows are done, the others after.
LONG = (chat(U, A, pad="x" * 4000).encode() + b"\n") * 1500


def read_while(path: Path, deed: Callable[[], object], cache: Path) -> TokenizedRows:
    """Read ``path``; ``deed`` is done once, after the first 200 rows."""
    waiting = [deed]

    def progress(_rows: int) -> None:
        if waiting:
            waiting.pop()()

    return tokenize_rows(
        str(path), renderer_of(FAMILY), TrainOn.ASSISTANT_TURNS, cache_dir=cache, on_progress=progress
    )  # fmt: skip


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(GOOD + b"\n")


def half_cut(path: Path) -> None:
    os.truncate(path, 3 * MB)


def cut_to_lines(path: Path) -> None:
    os.truncate(path, len(LONG) // 1500 * 1000)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(len(LONG) - 100)
        file.write(b"y")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


CHANGES = [(deed, False) for deed in (appended, half_cut, cut_to_lines, overwritten, emptied)]


@pytest.mark.parametrize(("deed", "packed"), [*CHANGES, (appended, True)])
def test_changed_while_it_is_read(tmp_path, deed, packed):
    path, cache = put(tmp_path / "rows.jsonl", LONG, packed=packed), tmp_path / "cache"
    with pytest.raises(DataError) as caught:
        read_while(path, lambda: deed(path), cache)
    assert str(caught.value) == f"{path}: {CHANGED}; {RUN_AGAIN}"
    assert list(cache.iterdir()) == []  # nothing of it is kept


@pytest.mark.parametrize("deed", [Path.unlink, lambda path: path.with_name("new").replace(path)])
def test_removed_or_replaced_while_it_is_read(tmp_path, deed):
    """The file that was opened is still there, whole."""
    put(tmp_path / "new", ROWS)
    path = put(tmp_path / "rows.jsonl", LONG)
    digest = file_digest(str(path))
    rows = read_while(path, lambda: deed(path), tmp_path / "cache")
    assert (len(rows), rows.sha256) == (1500, digest)
    if path.exists():
        assert len(read_while(path, lambda: None, tmp_path / "cache")) == 3  # not those of the cache


def test_changed_between_digest_and_reading(tmp_path, monkeypatch):
    path = put(tmp_path / "rows.jsonl", ROWS)
    real = sources._stream

    def late(*arguments):
        appended(path)
        return real(*arguments)

    monkeypatch.setattr(sources, "_stream", late)
    with pytest.raises(DataError, match="was changed while it was read"):
        read_while(path, lambda: None, tmp_path / "cache")


def test_another_file_comes_into_the_folder_meanwhile(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    put(data / "b.jsonl", LONG)
    rows = read_while(data, lambda: put(data / "a.jsonl", ROWS), tmp_path / "cache")
    assert len(rows) == 1500  # as it was at the start
    assert len(read_while(data, lambda: None, tmp_path / "cache")) == 1503


def test_a_file_that_grows_without_end_is_not_read_without_end(tmp_path):
    path = put(tmp_path / "rows.jsonl", ROWS)
    done = threading.Event()

    def grow() -> None:
        with path.open("ab") as file:
            while not done.is_set() and file.tell() < 200 * MB:
                file.write(LONG)
                file.flush()

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        while path.stat().st_size < len(LONG):
            time.sleep(0.001)
        assert "was changed while it was read" in refusal(path)
    finally:
        done.set()
        writer.join()


def test_not_more_is_read_than_there_was_at_the_start(tmp_path):
    endless = io.BufferedReader(WatchedFile(io.FileIO("/dev/zero"), "rows.jsonl", 10), 8)
    assert endless.read(8) == bytes(8)
    with pytest.raises(DataError, match=r"rows\.jsonl: was changed while it was read"):
        endless.read(8)


def test_a_pipe_that_took_the_place_of_a_file(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is a pipe, socket or device"):
        open_regular(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="is a pipe, socket or device"):
        open_file(str(tmp_path / "rows.jsonl"))


def test_gone_between_finding_and_opening(tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read \(No such file or directory\)"):
        open_file(str(tmp_path / "rows.jsonl"))


# --- what is far too large


@pytest.fixture
def little_memory() -> Iterator[None]:
    """At most 250 MB at a time are taken by Python while reading: a line of 64 MiB as bytes and as text, and more."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250e6


def bomb(path: Path, filling: bytes, mib: int) -> Path:
    """``mib`` MiB of ``filling`` in a few kB: one packed piece, repeated."""
    piece = gzip.compress(filling * (16 * MB // len(filling)), 9)
    return put(path, gzip.compress(GOOD + b"\n") + piece * (mib // 16))


def test_a_bomb_of_one_line_within_the_limit_of_dropping(tmp_path, little_memory):
    path = bomb(tmp_path / "rows.jsonl.gz", b"0", 128)
    assert path.stat().st_size < MB / 4
    assert f"{path}:2: line is longer than 67,108,864 bytes" in refusal(path)
    assert lines_of(read(path, skip_bad_rows=True)) == [1]


def test_a_bomb_of_one_line_beyond_it(tmp_path, monkeypatch, little_memory):
    assert sources._MOST_DROPPED_BYTES == 2**30
    monkeypatch.setattr(sources, "_MOST_DROPPED_BYTES", 2**27)
    path = bomb(tmp_path / "rows.jsonl.gz", b"[", 4096)  # 4 GiB would take long
    begin = time.monotonic()
    rule = "line is longer than 134,217,728 bytes"
    assert refused_for_good(path) == f"{path}:2: {rule}; write one JSON object a line"
    assert time.monotonic() - begin < 10


def test_a_bomb_of_blank_lines(tmp_path):
    path = bomb(tmp_path / "rows.jsonl.gz", b"\n", 1024)
    rule = "more than 1,048,576 bytes of blank lines without a row between them"
    assert refusal(path, skip_bad_rows=True) == f"{path}:1048578: {rule}; remove them"


def test_a_million_blank_bytes_are_still_blank(tmp_path):
    assert lines_of(read(put(tmp_path / "rows.jsonl", ROWS + b" " * (MB - 1) + b"\n" + GOOD))) == [1, 2, 3, 5]


TURNS = f"{json.dumps(U)}, {json.dumps(A)}, ".encode()
LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a text cut off": (lambda: b'{"text": "' + b"x" * 20 * MB, "not JSON at column 10: unterminated string"),
    "brackets": (lambda: b"[" * 20 * MB, "JSON is nested deeper than 100 levels"),
    "a number": (lambda: b'{"x": %s}' % (b"1" * 20 * MB), "a number has too many digits"),
    "a fraction": (lambda: b'{"text": 0.%s}' % (b"1" * 20 * MB), "text must be text, not a number"),
    "a list": (lambda: b'{"messages": [%s0]}' % (b"0," * 10 * MB), "messages are 10,485,761; a chat has at most 2,000"),
    "a key": (lambda: b'{"%s": 1}' % (b"messages" * 2 * MB), "no key messages or text"),
    "turns": (
        lambda: b'{"messages": [%s%s]}' % (TURNS * 249_999, TURNS[:-2]),
        "messages are 500,000; a chat has at most 2,000",
    ),
    "a role": (lambda: b'{"messages": [{"role": "%s"}]}' % (b"x" * 20 * MB), "message 1: unknown role"),
    "null bytes": (lambda: bytes(20 * MB), "not JSON at column 1: expected value"),
    "no UTF-8": (lambda: b"\xff" * 20 * MB, f"invalid UTF-8 at byte {len(GOOD) + 1} of the file"),
    "more than a line may have": (lambda: b"x" * (64 * MB + 1), "line is longer than 67,108,864 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "rule"), LARGE.values(), ids=LARGE)
def test_a_line_of_20_mb(tmp_path, line, rule):
    path = put(tmp_path / "rows.jsonl", b"\n".join([GOOD, line(), GOOD]))
    listed = refusal(path).split("\n")[1]
    assert listed.startswith(f"  {path}:2: {rule}")
    assert lines_of(read(path, skip_bad_rows=True)) == [1, 3]


def test_a_good_line_of_20_mb(tmp_path):
    path = put(tmp_path / "rows.jsonl", b"\n".join([GOOD, chat(U, A, pad="x " * 10 * MB).encode(), GOOD]))
    rows = read(path)
    assert [answers_of(rows, i) for i in range(3)] == [["a"]] * 3


def test_many_calls_answered_in_any_order_take_no_quadratic_time(tmp_path):
    calls = [{**CALL, "id": str(n)} for n in range(100_000)]
    answers = [{**T, "tool_call_id": str(n)} for n in reversed(range(100_000 - 1_500, 100_000))]
    line = chat(U, {**C, "tool_calls": calls}, *answers, A)
    begin = time.monotonic()
    path = put(tmp_path / "rows.jsonl", line.encode())
    assert "message 1503: assistant follows before 0, 1, 2 got a tool answer" in refusal(path)
    assert time.monotonic() - begin < 10


def test_a_very_long_chat(tmp_path):
    """Its answers are placed one by one, which takes time with the square of the turns."""
    begin = time.monotonic()
    rows = read(put(tmp_path / "rows.jsonl", chat(*[U, A] * 500).encode()))
    assert answers_of(rows, 0) == ["a"] * 500
    assert time.monotonic() - begin < 10  # four times as long for a chat of 2,000 messages
    assert "messages are 2,001; a chat has at most 2,000" in refusal(
        put(tmp_path / "rows.jsonl", chat(S, *[U, A] * 1000).encode())
    )


# --- the command


@pytest.mark.flow
def test_the_command_says_it_in_one_line(tmp_path, capfd):
    model = tiny_models.save_tiny_model(tmp_path / "model")
    os.mkfifo(tmp_path / "pipe.jsonl")
    places = {
        tmp_path / "pipe.jsonl": "is a pipe, socket or device",
        bomb(tmp_path / "bomb.jsonl.gz", b"\n", 64): "of blank lines without a row between them",
        put(tmp_path / "cut.jsonl.gz", PACKED[:-1]): "gzip data is truncated or damaged",
    }
    for place, says in places.items():
        settings = settings_for(tmp_path, model, tmp_path, train_path=str(place), valid_path=...)
        err = refused(capfd, ["check", str(write_config(tmp_path / "c.yaml", settings))])  # exit code 2
        assert err.startswith(f"Error: {place}")
        assert says in err
