"""The whole way from a data file to tokens, for the exam of bad data: as ``check`` and ``finetune`` go it."""

import gzip
from pathlib import Path

import pytest

from chat_rows import A, U, chat
from tiny_chats import named, renderer_of
from tunesmith.data.preview import trained_text
from tunesmith.data.rows import TokenizedRows
from tunesmith.data.splits import load_splits
from tunesmith.errors import DataError

FAMILY = named("qwen2.5")  # its template shows tools
END = "<|im_end|>"
GOOD = chat(U, A).encode()


def read(path: Path | str, *, skip_bad_rows: bool = False, task: str = "instruction_tuning") -> TokenizedRows:
    """The rows of a file, or the error that a user would see."""
    renderer = renderer_of(FAMILY)
    return load_splits(
        str(path), None, renderer, task, cache_dir=None, skip_bad_rows=skip_bad_rows
    ).train  # fmt: skip


def refusal(path: Path | str, *, skip_bad_rows: bool = False) -> str:
    """The text of the error with which a file must be refused. Another exception fails the test."""
    with pytest.raises(DataError) as caught:
        read(path, skip_bad_rows=skip_bad_rows)
    message = str(caught.value)
    first, *listed = message.split("\n")
    assert first.isprintable()
    assert all(line.isprintable() and len(line) < 1000 for line in listed)
    return message


def refused_for_good(path: Path | str) -> str:
    """One line, and the same whether or not bad rows are skipped: nobody could say what would be lost."""
    message = refusal(path)
    assert "\n" not in message
    assert refusal(path, skip_bad_rows=True) == message
    return message


def lines_of(rows: TokenizedRows) -> list[int]:
    """The line each row stands in."""
    return rows.line_numbers.tolist()


def answers_of(rows: TokenizedRows, index: int) -> list[str]:
    """What row ``index`` teaches, without the control token behind it."""
    texts = trained_text(rows.row(index), FAMILY.tokenizer)
    assert all(text.endswith(END) for text in texts)
    return [text.removesuffix(END) for text in texts]


def put(path: Path, data: bytes, *, packed: bool = False) -> Path:
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    return path
