"""All rows of a split as tokens: flat arrays, cached on disk by content, mapped rather than read."""

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.conversation import Example, Problem, ProblemList, iter_examples
from tunesmith.data.problems import shorten
from tunesmith.data.rendering import Renderer, TokenizedExample, TrainOn
from tunesmith.data.sources import RawRecord, file_digest, resolve_files
from tunesmith.data.token_store import Arrays, TokenStore, load_arrays

# Part of the cache key: raise it whenever rendering or masks change for the same input.
_FORMAT = 2
# Rows that are encoded together: enough to keep every core busy, few enough to be no matter of memory.
_BATCH_ROWS = 512
_BATCH_LETTERS = 4 * 2**20
_PROGRESS_EVERY = 200
_COUNTED_ROWS = 2**14


@dataclass(frozen=True)
class TokenizedRows:
    """Rows of one split, in file order.

    Attributes:
        path: what the user named.
        sha256: digest of the files' content.
        ids: int32, shape (tokens,): all rows one after the other.
        trained: bool, shape (tokens,).
        starts: int64, shape (rows + 1,): row i is ``ids[starts[i]:starts[i + 1]]``.
        files: the files that ``file_numbers`` counts.
        file_numbers, line_numbers: int32, shape (rows,): where each row was read.
        skipped: rows that broke a rule and were left out on request.
    """

    path: str
    sha256: str
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    starts: NDArray[np.int64]
    files: tuple[str, ...]
    file_numbers: NDArray[np.int32]
    line_numbers: NDArray[np.int32]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> TokenizedExample:
        here = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return TokenizedExample(self.ids[here], self.trained[here])

    def origin(self, index: int) -> str:
        """``FILE:LINE`` of a row."""
        return f"{self.files[self.file_numbers[index]]}:{self.line_numbers[index]}"

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, shape (rows,)."""
        return np.diff(self.starts)

    @property
    def trained_counts(self) -> NDArray[np.int64]:
        """Trained tokens of each row, shape (rows,)."""
        counts = np.empty(len(self), np.int64)
        for first in range(0, len(self), _COUNTED_ROWS):  # sums over all tokens would take 8 bytes for each
            starts = self.starts[first : first + _COUNTED_ROWS + 1]
            sums = np.cumsum(self.trained[starts[0] : starts[-1]], dtype=np.int64)
            counts[first : first + _COUNTED_ROWS] = np.diff(np.concatenate([[0], sums])[starts - starts[0]])
        return counts

    def select(self, keep: Sequence[int] | NDArray[np.int64], lengths: NDArray[np.int64]) -> "TokenizedRows":
        """The rows ``keep``, each cut to its entry in ``lengths`` (per row of this object)."""
        take = lengths[keep]
        starts = np.concatenate([[0], np.cumsum(take)]).astype(np.int64)
        ids, trained = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.bool_)
        all_ids, all_trained = np.asarray(self.ids), np.asarray(self.trained)  # slices of a memmap are slow
        places = zip(self.starts[:-1][keep].tolist(), starts.tolist(), take.tolist(), strict=False)
        for source, target, length in places:
            ids[target : target + length] = all_ids[source : source + length]
            trained[target : target + length] = all_trained[source : source + length]
        return TokenizedRows(
            self.path, self.sha256, ids, trained, starts, self.files,
            self.file_numbers[keep], self.line_numbers[keep], self.skipped,
        )  # fmt: skip


def tokenize_rows(
    path: str,
    renderer: Renderer,
    train_on: TrainOn,
    *,
    cache_dir: Path | None,
    skip_bad_rows: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> TokenizedRows:
    """Read, check, render and tokenise every row of ``path``.

    Args:
        path: file, folder, glob or URL, see ``data/sources.py``.
        renderer: renders with the run's tokenizer and template.
        train_on: which tokens are targets.
        cache_dir: where token arrays are kept, keyed by content; None: not kept.
        skip_bad_rows: leave out rows that break a rule instead of refusing the file.
        on_progress: called with the number of rows done.

    Raises:
        DataError: rows break a rule (the first 20 are listed), or the file cannot be read, or changes
            while it is read.
    """
    sha256 = file_digest(path)
    folder = cache_dir / _cache_key(path, sha256, renderer, train_on) if cache_dir is not None else None
    if folder is not None and (kept := load_arrays(folder)):
        return _rows(path, sha256, *kept)  # whole: only files without a bad row are kept
    report = on_progress or (lambda _rows: None)
    with TokenStore(cache_dir) as store, _old_objects_uncollected():
        rows = iter_examples(path, train_on.value, sha256)
        skipped, found = _tokenize(path, rows, renderer, train_on, skip_bad_rows, report, store)
        arrays = store.finish(None if skipped else folder, found)
    return _rows(path, sha256, arrays, tuple(found), skipped)


def _tokenize(
    path: str,
    examples: Iterable[tuple[RawRecord, Example | Problem]],
    renderer: Renderer,
    train_on: TrainOn,
    skip_bad_rows: bool,
    on_progress: Callable[[int], None],
    store: TokenStore,
) -> tuple[int, list[str]]:
    """Append every valid row to ``store``; how many were not, and the files that the others are in."""
    problems = ProblemList()
    files: dict[str, int] = {}
    rows = tokens = 0
    for batch in _rendered(examples, renderer, train_on):
        done: list[tuple[RawRecord, TokenizedExample]] = []
        for record, found in batch:
            if isinstance(found, Problem):
                problems.add(found)
            else:
                done.append((record, found))
        if done:
            store.append(_arrays(done, tokens, files))
            tokens += sum(len(row.ids) for _, row in done)
        for count in range(rows // _PROGRESS_EVERY + 1, (rows + len(done)) // _PROGRESS_EVERY + 1):
            on_progress(count * _PROGRESS_EVERY)
        rows += len(done)
    if not (skip_bad_rows and rows):
        problems.raise_if_any(path)
    return problems.total, list(files)


@contextmanager
def _old_objects_uncollected() -> Iterator[None]:
    """Keep the garbage collector, which each new row calls, off the objects that libraries made before."""
    if gc.get_freeze_count():  # a caller has done so, and would not want them back
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _rendered(
    rows: Iterable[tuple[RawRecord, Example | Problem]], renderer: Renderer, train_on: TrainOn
) -> Iterator[list[tuple[RawRecord, TokenizedExample | Problem]]]:
    """Batches of rows as tokens. A thread encodes one batch while the next is read, checked and rendered."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        waiting: tuple[list[tuple[RawRecord, Example | Problem]], Future[list[Any]]] | None = None
        for batch in _batches(rows):
            valid = [example for _, example in batch if not isinstance(example, Problem)]
            encoding = worker.submit(renderer.batch(valid, train_on).encode)
            if waiting is not None:
                yield _settled(waiting[0], waiting[1].result())
            waiting = batch, encoding
        if waiting is not None:
            yield _settled(waiting[0], waiting[1].result())


def _settled(
    batch: Sequence[tuple[RawRecord, Example | Problem]], encoded: Iterable[TokenizedExample | Exception]
) -> list[tuple[RawRecord, TokenizedExample | Problem]]:
    results = iter(encoded)
    found: list[tuple[RawRecord, TokenizedExample | Problem]] = []
    for record, example in batch:
        result = example if isinstance(example, Problem) else next(results)
        if isinstance(result, Exception):
            result = Problem(record.file, record.line, str(result), shorten(record.text))
        found.append((record, result))
    return found


def _batches(
    rows: Iterable[tuple[RawRecord, Example | Problem]],
) -> Iterator[list[tuple[RawRecord, Example | Problem]]]:
    batch: list[tuple[RawRecord, Example | Problem]] = []
    letters = 0
    for row in rows:
        batch.append(row)
        letters += len(row[0].text)
        if len(batch) == _BATCH_ROWS or letters >= _BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _arrays(rows: Sequence[tuple[RawRecord, TokenizedExample]], tokens: int, files: dict[str, int]) -> Arrays:
    """What a batch adds to the arrays behind ``tokens`` tokens; a new file is added to ``files``."""
    ends = tokens + np.cumsum([len(row.ids) for _, row in rows])
    return {
        "ids": np.concatenate([row.ids for _, row in rows]),
        "trained": np.concatenate([row.trained for _, row in rows]),
        "starts": ends if tokens else np.concatenate([[0], ends]),
        "file_numbers": np.array([files.setdefault(record.file, len(files)) for record, _ in rows]),
        "line_numbers": np.array([record.line for record, _ in rows]),
    }


def _rows(path: str, sha256: str, arrays: Arrays, files: tuple[str, ...], skipped: int = 0) -> TokenizedRows:
    return TokenizedRows(
        path, sha256, arrays["ids"], arrays["trained"], arrays["starts"], files,
        arrays["file_numbers"], arrays["line_numbers"], skipped,
    )  # fmt: skip


def _cache_key(path: str, sha256: str, renderer: Renderer, train_on: TrainOn) -> str:
    digest = hashlib.sha256(renderer.identity.encode())
    digest.update(json.dumps([_FORMAT, resolve_files(path), sha256, train_on.value]).encode())
    return digest.hexdigest()[:32]
