"""Tokenised rows for tests, from plain lists."""

from collections.abc import Sequence

import numpy as np

from tunesmith.data.rows import TokenizedRows


def token_rows(
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]], path: str = "rows.jsonl"
) -> TokenizedRows:
    """Each row is (ids, whether each is trained); row i was read at line i + 1."""
    lengths = [len(ids) for ids, _ in rows]
    return TokenizedRows(
        path=path,
        sha256="0" * 64,
        ids=np.array([i for ids, _ in rows for i in ids], np.int32),
        trained=np.array([t for _, trained in rows for t in trained], np.bool_),
        starts=np.array([sum(lengths[:n]) for n in range(len(rows) + 1)], np.int64),
        files=(path,),
        file_numbers=np.zeros(len(rows), np.int32),
        line_numbers=np.arange(1, len(rows) + 1, dtype=np.int32),
    )


def row_of(prompt: int, answer: int, first: int = 0) -> tuple[list[int], list[bool]]:
    """``prompt`` tokens of context and ``answer`` trained ones, numbered from ``first``."""
    return list(range(first, first + prompt + answer)), [False] * prompt + [True] * answer
