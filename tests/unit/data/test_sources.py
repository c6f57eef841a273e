"""Files -> raw rows: what is found, how lines are cut, what is refused, how much memory it takes."""

import gzip
import hashlib
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data import sources
from tunesmith.data.sources import Problem, RawRecord, file_digest, read_records
from tunesmith.errors import DataError

ROW = b'{"text": "a"}\n'


def put(path: Path, data: bytes = ROW) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def texts(path: str) -> list[str]:
    rows = list(read_records(path))
    assert all(isinstance(row, RawRecord) for row in rows), rows
    return [row.text for row in rows]


def refusal(path: str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- rows and lines


def test_records_carry_file_and_line_and_blank_lines_count(tmp_path):
    path = put(tmp_path / "a.jsonl", b"\n1\n  \t\n\xe3\x80\x80\n2\r\n\r\n3")
    assert list(read_records(path)) == [
        RawRecord("1", path, 2),
        RawRecord("2", path, 5),
        RawRecord("3", path, 7),
    ]


@pytest.mark.parametrize("other", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r"])
def test_only_lf_ends_a_line(tmp_path, other):
    assert texts(put(tmp_path / "a.jsonl", f"a{other}b\nc\n".encode())) == [f"a{other}b", "c"]


def test_byte_order_mark_is_dropped_at_the_start_of_each_file_only(tmp_path):
    put(tmp_path / "a.jsonl", b"\xef\xbb\xbf1\n\xef\xbb\xbf2\n")
    put(tmp_path / "b.jsonl.gz", gzip.compress(b"\xef\xbb\xbf3\n"))
    assert texts(str(tmp_path)) == ["1", "\ufeff2", "3"]


@given(st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8")), min_size=1), st.booleans())
def test_any_lines_survive(tmp_path_factory, lines, packed):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    data = ("x\n" + "\n".join(lines)).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    kept = [(number, line) for number, line in enumerate(lines, start=2) if line.strip()]
    expected = [(number, line.removesuffix("\r")) for number, line in kept]
    assert [(row.line, row.text) for row in read_records(str(path))][1:] == expected


@pytest.mark.parametrize("wrap", [bytes, gzip.compress])
def test_invalid_utf8_gives_its_byte_offset_and_reading_goes_on(tmp_path, wrap):
    data = b"\xef\xbb\xbfab\n" + "é".encode() + b"x\xff\xfey\n" + b"cut\xe2\x82\n" + b"good\n"
    rows = list(read_records(put(tmp_path / "a.jsonl", wrap(data))))
    assert [row.line for row in rows] == [1, 2, 3, 4]
    assert rows[1] == Problem(rows[0].file, 2, "invalid UTF-8 at byte 9 of the file", r"éx\xff\xfey")
    assert rows[2].rule == "invalid UTF-8 at byte 16 of the file"
    assert data[9:10] == b"\xff"
    assert data[16:17] == b"\xe2"
    assert rows[3].text == "good"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf16_is_named(tmp_path, encoding):
    text = '\ufeff{"text": "a"}\n' if encoding == "utf-16-be" else '{"text": "a"}\n'
    for data in (text.encode(encoding), gzip.compress(text.encode(encoding))):
        assert "is UTF-16 or UTF-32 text; save it as UTF-8" in refusal(put(tmp_path / "a.jsonl", data))


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"\n \r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", gzip.compress(b"")]
)
def test_no_rows(tmp_path, data):
    assert "a.jsonl: has no rows" in refusal(put(tmp_path / "a.jsonl", data))


def test_an_empty_file_among_others_is_no_error(tmp_path):
    put(tmp_path / "a.jsonl", b"")
    put(tmp_path / "b.jsonl", b"1\n")
    assert texts(str(tmp_path)) == ["1"]


# --- compressed and foreign files


def test_gzip_is_known_by_content_and_may_have_several_members(tmp_path):
    assert texts(put(tmp_path / "plain_name.jsonl", gzip.compress(b"1\n2") + gzip.compress(b"3\n"))) == [
        "1",
        "23",
    ]


def damaged() -> dict[str, bytes]:
    body = b"".join(b'{"text": "%d"}\n' % (n * 7919) for n in range(5000))
    whole = gzip.compress(body)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    checksum = whole[:-8] + bytes(4) + whole[-4:]
    return {
        "half": whole[: len(whole) // 2],
        "no trailer": whole[:-8],
        "flipped": bytes(flipped),
        "checksum": checksum,
        "header only": whole[:10],
        "magic only": whole[:2],
        "garbage after": whole + b"garbage",
    }


@pytest.mark.parametrize("kind", damaged())
def test_damaged_gzip_stops_with_an_error(tmp_path, kind):
    message = refusal(put(tmp_path / "a.jsonl.gz", damaged()[kind]))
    assert "a.jsonl.gz: gzip data is truncated or damaged after" in message


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl.gz", ROW, "is named .gz but is not gzip"),
        ("a.parquet", b"PAR1\x15\x04", "is a Parquet file; convert it to JSONL"),
        ("a.zip", b"PK\x03\x04\x14\x00", "is a zip file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "is a zstd file"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00\x00", "is a xz file"),
        ("a.jsonl.bz2", b"BZh91AY", "is a bzip2 file"),
    ],
)
def test_other_formats_are_named(tmp_path, name, data, says):
    assert says in refusal(put(tmp_path / name, data))


# --- size


def test_five_megabyte_line(tmp_path):
    long = "é" * 2_500_000
    assert texts(put(tmp_path / "a.jsonl", f"a\n{long}\nb".encode())) == ["a", long, "b"]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_line_limit_is_exact(tmp_path, monkeypatch, end):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 10)
    path = put(tmp_path / "a.jsonl", b"1234567890\n12345678901\nok\n123456789012" + end)
    rows = list(read_records(path))
    assert [row.text for row in rows] == ["1234567890", "12345678901", "ok", "12345678901"]
    assert [isinstance(row, Problem) for row in rows] == [False, True, False, True]
    assert rows[3] == Problem(path, 4, "line is longer than 10 bytes", "12345678901")


def test_gzip_bomb_is_bounded_by_the_line_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 2**20)
    path = put(tmp_path / "a.jsonl.gz", gzip.compress(b"0" * 2**25 + b"\nafter\n", 1))
    assert Path(path).stat().st_size < 2**20
    tracemalloc.start()
    rows = list(read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(rows[0], Problem)
    assert rows[0].rule == "line is longer than 1,048,576 bytes"
    assert rows[1] == RawRecord("after", path, 2)
    assert peak < 12 * 2**20  # of 32 MiB


def test_rows_are_streamed(tmp_path):
    path = put(tmp_path / "a.jsonl", (b"x" * 1023 + b"\n") * 5_000)
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5_000
    assert peak < 2**20  # of 5 MiB


# --- digest


def test_digest_of_one_file_is_its_sha256_and_of_several_depends_on_content_order_and_borders(tmp_path):
    assert file_digest(put(tmp_path / "one", b"12\n3\n")) == hashlib.sha256(b"12\n3\n").hexdigest()
    seen = set()
    for number, (first, second) in enumerate(
        [(b"1", b"2\n"), (b"12", b"\n"), (b"2\n", b"1"), (b"1", b"3\n")]
    ):
        folder = tmp_path / str(number)
        put(folder / "a.jsonl", first)
        put(folder / "b.jsonl", second)
        seen.add(file_digest(str(folder)))
    inner = [hashlib.sha256(part).digest() for part in (b"1", b"2\n")]
    assert hashlib.sha256(b"".join(inner)).hexdigest() in seen
    assert len(seen) == 4
