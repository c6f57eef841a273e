"""Where a training does not fit into memory: the settings nearest to its own with which it would.

A smaller batch is not among them: the rows of a step are computed a few at a time, down to one, whatever the batch.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tunesmith.config.lora_keys import LORA_DEFAULTS
from tunesmith.data.lengths import fit_to_length
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import DataError
from tunesmith.models.kernels.decoder import Decoder
from tunesmith.models.kernels.layer import Layer
from tunesmith.models.kernels.linear import Adapter, Linear

_GRAIN = 32  # tokens: a length is named to so many
_CHECKPOINTING = "gradient_checkpointing: true"


@dataclass(frozen=True)
class Beside:
    """Rows that must fit beside those that are trained on, in tokens; 0: none.

    Attributes:
        padded: the length that every row may be padded to.
        evaluated: of the longest row that only losses are taken of.
        predicted: most of such a row that are answers, whose losses are taken.
        kept: of those, the longest that a smaller ``context_length`` does not cut: rows of a test file.
        answering: bytes, and no tokens: what answering held-out rows takes, while training's are given back.
    """

    padded: int = 0
    evaluated: int = 0
    predicted: int = 0
    kept: int = 0
    answering: int = 0

    def cut(self, length: int) -> "Beside":
        """With ``context_length: length``."""
        return replace(
            self, padded=min(self.padded, length), evaluated=max(self.kept, min(self.evaluated, length))
        )

    def shortened(self, length: int) -> "Beside":
        """With held-out rows of no more than ``length`` tokens."""
        return replace(self, evaluated=min(self.evaluated, length), kept=min(self.kept, length))


NOTHING = Beside()
# Decoder, rows, bytes of what is trained, rows beside -> bytes beside the loaded model, in the smallest micro-batches.
Needs = Callable[[Decoder, TokenizedRows, int, Beside], int]


@dataclass(frozen=True)
class _Run:
    """A run, or what it would be with other settings; ``loaded``: bytes that are loaded beside what is there."""

    decoder: Decoder
    rows: TokenizedRows
    trained_bytes: int
    beside: Beside
    loaded: int = 0

    def fits(self, needs: Needs, free: int) -> bool:
        return needs(self.decoder, self.rows, self.trained_bytes, self.beside) + self.loaded <= free

    @property
    def longest(self) -> int:
        """The context length at which nothing is cut."""
        return max(int(self.rows.lengths.max()), self.beside.padded, self.beside.evaluated)

    def cut(self, length: int) -> "_Run | None":
        """With ``context_length: length`` and truncated rows; None: nothing is left to train on in so few tokens."""
        try:
            rows = fit_to_length(self.rows, length, "truncate")
        except DataError:
            return None
        return replace(self, rows=rows, beside=self.beside.cut(length))


def nearest(
    needs: Needs, decoder: Decoder, rows: TokenizedRows, trained_bytes: int, free: int,
    beside: Beside = NOTHING,
) -> str:  # fmt: skip
    """What to change, for people: each change that is enough by itself, else as few together as are enough.

    Shorter rows are named last, and then with all the others.

    Args:
        needs: the memory model.
        decoder: of the run that does not fit; ``rows``, ``trained_bytes``, ``beside``: its own.
        free: bytes there are.
    """
    run = _Run(decoder, rows, trained_bytes, beside)

    def fits(other: _Run) -> bool:
        return other.fits(needs, free)

    enough = [text for text, other in _changes(run) if fits(other)]
    length = _longest_that_fits(run.cut, fits, run.longest)
    if length is not None:
        enough.append(_context_length(length, run))
    length = _longest_held_out(run, fits)
    if length is not None:
        enough.append(_held_out(length, run))
    if enough:
        return f"it would fit with {' or with '.join(enough)}"
    every = [text for text, _ in _changes(run)]
    for count in range(2, len(every) + 1):
        for some in itertools.combinations(every, count):
            if fits(_changed(run, some)):
                return _it_would_fit(some)
    run = _changed(run, every)
    if (shorter := _shorter(run, fits)) is not None:
        return _it_would_fit([*every, *shorter])
    if not every:
        return "no setting would make it fit: take a smaller model"
    return f"not even {' and '.join(every)} would make it fit: take a smaller model"


def default_adapter_bytes(decoder: Decoder) -> int:
    """Bytes of an adapter with the documented defaults: every linear layer, the embeddings and the head, float32."""
    rank = int(LORA_DEFAULTS["r"])
    return sum(rank * sum(part.weight.shape) * part.weight.element_size() for part in _linears(decoder))


def with_default_adapter(decoder: Decoder) -> Decoder:
    """The decoder with such an adapter, whose tensors take no memory: for counting, not for computing."""

    def adapted(part: Linear) -> Linear:
        number = part.weight.new_zeros(())
        out, width = part.weight.shape
        if part is decoder.embeddings:  # its input is a token's number
            out, width = width, out
        rank = int(LORA_DEFAULTS["r"])
        adapter = Adapter(
            number.expand(rank, width), number.expand(out, rank), 1.0, float(LORA_DEFAULTS["lora_dropout"])
        )  # fmt: skip
        return replace(part, adapter=adapter)

    def layer(old: Layer) -> Layer:
        q, k, v = map(adapted, old.qkv)
        gate, up = map(adapted, old.gate_up)
        return replace(
            old, qkv=(q, k, v), output=adapted(old.output), gate_up=(gate, up), down=adapted(old.down)
        )

    with torch.no_grad():
        return replace(
            decoder,
            embeddings=adapted(decoder.embeddings),
            layers=tuple(layer(old) for old in decoder.layers),
            head=adapted(decoder.head),
        )


def _changes(run: _Run) -> Iterator[tuple[str, _Run]]:
    """Settings that a run does not have yet, and it with each, the strongest first."""
    if all(part.adapter is None for part in _linears(run.decoder)):
        size = default_adapter_bytes(run.decoder)
        # The adapter is loaded beside what is there.
        lora = replace(run, decoder=with_default_adapter(run.decoder), trained_bytes=size, loaded=size)
        yield "lora_config instead of full-parameter", lora
    if run.decoder.saves_activations:
        yield _CHECKPOINTING, replace(run, decoder=replace(run.decoder, saves_activations=False))
    if run.beside.padded > int(run.rows.lengths.max()):
        yield "padding: longest", replace(run, beside=replace(run.beside, padded=0))
    if run.beside.answering:
        text = f"evaluation left out (its answers take {run.beside.answering / 1e9:.1f} GB)"
        yield text, replace(run, beside=replace(run.beside, answering=0))


def _changed(run: _Run, texts: Sequence[str]) -> _Run:
    for text in texts:
        run = dict(_changes(run))[text]
    return run


def _shorter(run: _Run, fits: Callable[[_Run], bool]) -> list[str] | None:
    """Shorter rows with which it fits: those that ``context_length`` cuts, else held-out ones, else both; or None."""
    length = _longest_that_fits(run.cut, fits, run.longest)
    if length is not None:
        return [_context_length(length, run)]
    held = _longest_held_out(run, fits)
    if held is not None:
        return [_held_out(held, run)]
    trained = replace(run, beside=run.beside.shortened(_GRAIN))
    length = _longest_that_fits(trained.cut, fits, trained.longest)
    cut = run.cut(length) if length is not None else None
    held = _longest_held_out(cut, fits) if cut is not None else None
    if length is None or held is None:
        return None
    return [_context_length(length, run), _held_out(held, run)]


def _linears(decoder: Decoder) -> list[Linear]:
    parts = [decoder.embeddings, decoder.head]
    for layer in decoder.layers:
        parts += [*layer.qkv, layer.output, *layer.gate_up, layer.down]
    return parts


def _context_length(length: int, run: _Run) -> str:
    text, cut = f"context_length: {length} with on_too_long: truncate", (run.rows.lengths > length).mean()
    return f"{text} (which cuts {f'{cut:.0%}' if cut >= 0.01 else 'under 1%'} of the rows)" if cut else text


def _held_out(length: int, run: _Run) -> str:
    return f"held-out rows of at most {length:,} tokens (the longest has {run.beside.evaluated:,})"


def _it_would_fit(changes: Sequence[str]) -> str:
    return f"it would fit with {', '.join(changes[:-1])}{' and ' if changes[1:] else ''}{changes[-1]}"


def _longest_held_out(run: _Run, fits: Callable[[_Run], bool]) -> int | None:
    """How long held-out rows may be; None: it is not by them that the run does not fit."""
    return _longest_that_fits(
        lambda to: replace(run, beside=run.beside.shortened(to)), fits, run.beside.evaluated
    )


def _longest_that_fits(
    made: Callable[[int], _Run | None], fits: Callable[[_Run], bool], longest: int
) -> int | None:
    """The largest length below ``longest`` with which it fits, by halving; None: none does."""

    def is_enough(length: int) -> bool:
        run = made(length)
        return run is not None and fits(run)

    low, high = 0, (longest - 1) // _GRAIN
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_enough(middle * _GRAIN) else (low, middle - 1)
    return low * _GRAIN or None
