"""A rendered row -> its token ids and which of them are trained: one row at a time, or many at once.

Many at once is far faster, with the same result. Rows of one data set share their system message, headers
and closing tokens, so each row is cut into pieces, each different piece is encoded once, and all of them in
a few calls, which the tokenizer spreads over the processor's cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tunesmith.data.control_tokens import Border, ControlTokens, Piece


@dataclass(frozen=True)
class TokenizedExample:
    """One row as tokens.

    Attributes:
        ids: token ids, int32, shape (length,).
        trained: bool, shape (length,); True where the token is a target. Never True at index 0, for which
            nothing could predict it.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation's text, and what has to be known of it to encode it.

    Attributes:
        text: what the chat template produced.
        messages: where messages stand in it, if any of them spells a control token; else empty.
        prompt_ends: see ``ControlTokens.encode_rendered``.
        trained: the places whose tokens are targets; None: all.
    """

    text: str
    messages: Sequence[Border]
    prompt_ends: Sequence[int]
    trained: Sequence[Border] | None


def encode_chat(chat: RenderedChat, control: ControlTokens) -> TokenizedExample:
    """Tokens of one conversation."""
    ids, offsets = control.encode_rendered(chat.text, chat.messages, chat.prompt_ends)
    if chat.trained is None:
        return _all_trained(ids)
    return _without_first(ids, _overlapping(offsets, chat.trained))


def encode_document(text: str, control: ControlTokens) -> TokenizedExample:
    """Tokens of one plain text."""
    return _all_trained(control.encode_text(text))


class EncodingBatch:
    """Rows, and others' results between them, to be encoded together."""

    def __init__(self, control: ControlTokens) -> None:
        self._control = control
        self._slots: dict[tuple[Tokenizer, str, tuple[Border, ...]], int] = {}
        self._rows: list[_WaitingRow | TokenizedExample | Exception] = []

    def add(self, row: RenderedChat | str | Exception) -> None:
        """Add a conversation, a plain text, or the reason why there is neither."""
        if isinstance(row, Exception):
            self._rows.append(row)
        elif isinstance(row, str):
            piece = self._control.document(row)
            waits = piece and _WaitingRow(
                self._slots_of(row, [piece], ()), is_document=True, is_all_trained=True
            )
            self._rows.append(waits or encode_document(row, self._control))
        elif row.messages:  # few rows spell control tokens
            self._rows.append(encode_chat(row, self._control))
        else:
            pieces = self._control.pieces(row.text, row.prompt_ends)
            slots = self._slots_of(row.text, pieces, row.trained or ())
            self._rows.append(_WaitingRow(slots, is_document=False, is_all_trained=row.trained is None))

    def encode(self) -> list[TokenizedExample | Exception]:
        """What ``encode_chat`` and ``encode_document`` give, in the order in which the rows were added."""
        encoded = _encode_all(list(self._slots))
        return [self._joined(row, encoded) if isinstance(row, _WaitingRow) else row for row in self._rows]

    def _slots_of(self, text: str, pieces: Sequence[Piece], trained: Sequence[Border]) -> list[int]:
        slots, new = [], self._slots
        for tokenizer, begin, end in pieces:
            here: tuple[Border, ...] = ()
            for first, last in trained:
                if first < end and last > begin:
                    here += ((max(first - begin, 0), min(last, end) - begin),)
            slots.append(new.setdefault((tokenizer, text[begin:end], here), len(new)))
        return slots

    def _joined(self, row: "_WaitingRow", encoded: Sequence[TokenizedExample]) -> TokenizedExample:
        ids = np.concatenate([encoded[slot].ids for slot in row.slots])
        if row.is_document:
            ids = self._control.framed(ids)
        if row.is_all_trained:
            return _all_trained(ids)
        return _without_first(ids, np.concatenate([encoded[slot].trained for slot in row.slots]))


@dataclass(frozen=True, slots=True)
class _WaitingRow:
    slots: Sequence[int]
    is_document: bool
    is_all_trained: bool


def _encode_all(pieces: Sequence[tuple[Tokenizer, str, tuple[Border, ...]]]) -> list[TokenizedExample]:
    """The tokens of each (tokenizer, text, places that are trained)."""
    groups: dict[tuple[Tokenizer, bool], list[int]] = {}
    for slot, (tokenizer, _, trained) in enumerate(pieces):
        groups.setdefault((tokenizer, bool(trained)), []).append(slot)
    found: dict[int, TokenizedExample] = {}
    for (tokenizer, needs_offsets), slots in groups.items():
        encode = tokenizer.encode_batch if needs_offsets else tokenizer.encode_batch_fast
        encodings = encode([pieces[slot][1] for slot in slots], add_special_tokens=False)
        for slot, encoding in zip(slots, encodings, strict=True):
            ids = np.array(encoding.ids, np.int32)
            mask = _mask(encoding, pieces[slot][2]) if needs_offsets else np.zeros(len(ids), np.bool_)
            found[slot] = TokenizedExample(ids, mask)
    return [found[slot] for slot in range(len(pieces))]


def _mask(encoding: Any, trained: Sequence[Border]) -> NDArray[np.bool_]:
    return _overlapping(np.array(encoding.offsets, np.int64).reshape(-1, 2), trained)


def _overlapping(offsets: NDArray[np.int64], places: Sequence[Border]) -> NDArray[np.bool_]:
    """Which tokens overlap one of ``places``; never one that stands for no text.

    Args:
        offsets: each token's character borders, shape (tokens, 2).
        places: character borders in the same text.
    """
    first, last = offsets[:, 0], offsets[:, 1]
    found = np.zeros(len(offsets), dtype=np.bool_)
    for begin, end in places:
        found |= (last > begin) & (first < end)
    found &= last > first
    return found


def _all_trained(ids: NDArray[np.int32]) -> TokenizedExample:
    return _without_first(ids, np.ones(len(ids), dtype=np.bool_))


def _without_first(ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> TokenizedExample:
    trained[:1] = False
    return TokenizedExample(ids, trained)
