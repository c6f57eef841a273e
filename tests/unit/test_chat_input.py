"""What ``tunesmith chat`` reads: text, and what is none."""

import io
import sys

import pytest
from rich.console import Console

from tunesmith import chat
from tunesmith.errors import DataError


def read(monkeypatch: pytest.MonkeyPatch, data: bytes, errors: str = "strict") -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors))
    return list(chat._messages(Console(file=io.StringIO())))


def test_lines_until_the_end(monkeypatch: pytest.MonkeyPatch):
    assert read(monkeypatch, "café\n\n  two \n".encode()) == ["café", "two"]
    assert read(monkeypatch, b"one\n/exit\ntwo\n") == ["one"]


def test_bytes_that_are_no_text_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match=r"standard input: is not UTF-8 \(byte \d+\)"):
        read(monkeypatch, b"caf\xe9\n")


def test_under_a_locale_that_lets_them_pass_they_do_not_reach_a_tokenizer(monkeypatch: pytest.MonkeyPatch):
    (said,) = read(monkeypatch, b"caf\xe9\n", "surrogateescape")
    assert said == "caf?"
