"""Which rows are longer than the model may read, what that costs, and what is done about it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import DataError, printable

OnTooLong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True)
class LengthCensus:
    """Token lengths of a split and what a limit would cut."""

    rows: int
    tokens: int
    trained_tokens: int
    p50: int
    p95: int
    longest: int
    limit: int
    rows_over: int
    tokens_over: int
    trained_over: int  # trained tokens beyond the limit

    @property
    def trained_share_lost(self) -> float:
        """Share of all trained tokens that truncation would lose."""
        return self.trained_over / self.trained_tokens if self.trained_tokens else 0.0


def census(rows: TokenizedRows, limit: int | None) -> LengthCensus:
    """Count lengths; ``limit`` None means the longest row."""
    lengths = rows.lengths
    if len(lengths) == 0:
        return LengthCensus(0, 0, 0, 0, 0, 0, limit or 0, 0, 0, 0)
    longest = int(lengths.max())
    limit = limit or longest
    over = np.flatnonzero(lengths > limit)
    trained_over = sum(int(rows.row(int(i)).trained[limit:].sum()) for i in over)
    p50, p95 = np.percentile(lengths, [50, 95], method="higher")
    return LengthCensus(
        len(rows), int(lengths.sum()), int(rows.trained.sum()), int(p50), int(p95), longest, limit,
        len(over), int((lengths[over] - limit).sum()), trained_over,
    )  # fmt: skip


def fit_to_length(rows: TokenizedRows, limit: int, on_too_long: OnTooLong) -> TokenizedRows:
    """Rows no longer than ``limit`` tokens.

    ``drop`` leaves long rows out; ``truncate`` cuts their end, and leaves out rows without a trained token.

    Raises:
        DataError: ``on_too_long`` is ``error`` and a row is too long, or no row remains.
    """
    count = census(rows, limit)
    if not count.rows_over:
        return rows
    if on_too_long == "error":
        first = int(np.flatnonzero(rows.lengths > limit)[0])
        raise DataError(
            printable(rows.origin(first)),
            f"{count.rows_over:,} of {count.rows:,} rows exceed context_length {limit:,} (longest "
            f"{count.longest:,}); cutting them would lose {count.tokens_over:,} tokens, "
            f"{count.trained_share_lost:.2%} of the trained ones",
            "raise context_length, or set on_too_long to drop or truncate",
        )
    lengths = np.minimum(rows.lengths, limit)
    keep = np.flatnonzero(rows.lengths <= limit)
    if on_too_long == "truncate":
        learns = rows.trained_counts > 0
        for index in np.flatnonzero(rows.lengths > limit):
            learns[index] = rows.row(int(index)).trained[:limit].any()
        keep = np.flatnonzero(learns)
    if len(keep) == 0:
        raise DataError(
            printable(rows.path), f"no row is left at context_length {limit:,}", "raise context_length"
        )
    return rows.select(keep, lengths)
