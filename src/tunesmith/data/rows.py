"""All rows of a split as tokens: flat arrays, cached on disk by content, mapped rather than read."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.conversation import Problem, ProblemList, iter_examples
from tunesmith.data.problems import shorten
from tunesmith.data.rendering import Renderer, RenderingError, TokenizedExample, TrainOn
from tunesmith.data.sources import file_digest, resolve_files

# Part of the cache key: raise it whenever rendering or masks change for the same input.
_FORMAT = 2


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
        sums = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return np.asarray(np.diff(sums[self.starts]))

    def select(self, keep: Sequence[int] | NDArray[np.int64], lengths: NDArray[np.int64]) -> "TokenizedRows":
        """The rows ``keep``, each cut to its entry in ``lengths`` (per row of this object)."""
        begin, take = self.starts[:-1][keep], lengths[keep]
        pieces = [np.arange(b, b + n) for b, n in zip(begin, take, strict=True)]
        index = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
        starts = np.concatenate([[0], np.cumsum(take)]).astype(np.int64)
        return TokenizedRows(
            self.path, self.sha256, self.ids[index], self.trained[index], starts, self.files,
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
        DataError: rows break a rule (the first 20 are listed), or the file cannot be read.
    """
    sha256 = file_digest(path)
    key = _cache_key(path, sha256, renderer, train_on)
    if cache_dir is not None and (found := _load(cache_dir / key, path, sha256)):
        return found  # whole: only files without a bad row are kept
    rows = _tokenize(path, sha256, renderer, train_on, skip_bad_rows, on_progress)
    if cache_dir is not None and not rows.skipped:
        _store(cache_dir / key, rows)
    return rows


def _tokenize(
    path: str,
    sha256: str,
    renderer: Renderer,
    train_on: TrainOn,
    skip_bad_rows: bool,
    on_progress: Callable[[int], None] | None,
) -> TokenizedRows:
    ids: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    origins: list[tuple[str, int]] = []
    problems = ProblemList()
    for record, example in iter_examples(path, train_on.value):
        if isinstance(example, Problem):
            problems.add(example)
            continue
        try:
            tokens = renderer.example(example, train_on)
        except RenderingError as error:
            problems.add(Problem(record.file, record.line, str(error), shorten(record.text)))
            continue
        ids.append(tokens.ids)
        trained.append(tokens.trained)
        origins.append((record.file, record.line))
        if on_progress and len(ids) % 200 == 0:
            on_progress(len(ids))
    if not (skip_bad_rows and ids):
        problems.raise_if_any(path)
    files = tuple(dict.fromkeys(file for file, _ in origins))
    numbers = {file: number for number, file in enumerate(files)}
    return TokenizedRows(
        path, sha256,
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.concatenate(trained) if trained else np.zeros(0, np.bool_),
        np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64),
        files,
        np.array([numbers[file] for file, _ in origins], np.int32),
        np.array([line for _, line in origins], np.int32),
        problems.total,
    )  # fmt: skip


def _cache_key(path: str, sha256: str, renderer: Renderer, train_on: TrainOn) -> str:
    digest = hashlib.sha256(renderer.identity.encode())
    digest.update(json.dumps([_FORMAT, resolve_files(path), sha256, train_on.value]).encode())
    return digest.hexdigest()[:32]


_ARRAYS = ("ids", "trained", "starts", "file_numbers", "line_numbers")


def _store(folder: Path, rows: TokenizedRows) -> None:
    # A cache only: where it cannot be written, the run goes on without.
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(rows, name), allow_pickle=False)
        (temporary / "files.json").write_text(json.dumps(rows.files), encoding="utf-8")
        os.rename(temporary, folder)  # noqa: PTH104 - must fail, not replace, when another process was first
    except OSError:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _load(folder: Path, path: str, sha256: str) -> TokenizedRows | None:
    if not folder.is_dir():
        return None
    try:
        arrays: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS
        }
        files = tuple(json.loads((folder / "files.json").read_text(encoding="utf-8")))
        rows = TokenizedRows(path, sha256, files=files, **arrays)
        if not len(rows.ids) == len(rows.trained) == rows.starts[-1]:
            raise ValueError("arrays of different rows")
    except (OSError, ValueError, EOFError, LookupError):
        # Torn, as by a power cut: out of the way, so that the rows can be kept again.
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return rows
