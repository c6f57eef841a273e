"""From logits to a token: bias, temperature, nucleus (Holtzman et al. 2020, arXiv:1904.09751), logprobs.

Each request draws from a generator of its own, one number a token, and turns it into a token by the inverse of the
cumulative distribution: what it gets depends on its own seed and logits, and on nothing that runs beside it.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch

from tunesmith.serving.seam import Constraint, EngineError, Sampling

_GREEDY_BELOW = 1e-5  # temperatures that would only overflow
_FIRST_LIKELIEST = 128  # tokens looked at first for the nucleus, eight times as many until it is full


class Chooser:
    """Chooses the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._constraint: Constraint | None = sampling.constraint() if sampling.constraint else None
        is_free = not sampling.logit_bias and self._constraint is None
        self.is_plain = sampling.temperature < _GREEDY_BELOW and is_free
        self._random = random.Random(sampling.seed)
        for token in sampling.made:
            self._pass(token)
        bias = sorted(sampling.logit_bias.items())
        self._biased = torch.tensor([token for token, _ in bias], dtype=torch.int64)
        self._bias = torch.tensor([value for _, value in bias], dtype=torch.float32)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, for ``logits`` (vocabulary,), which are not changed.

        Raises:
            EngineError: the constraint leaves nothing to choose from.
        """
        if len(self._biased):
            logits = logits.index_add(0, self._biased, self._bias)
        if self._constraint is not None:
            logits = logits.masked_fill(~torch.from_numpy(self._constraint.mask()), -torch.inf)
            if not logits.max().isfinite():
                raise EngineError("no token fits the form that the answer has to have")
        sampling = self.sampling
        if sampling.temperature < _GREEDY_BELOW:
            return int(logits.argmax())
        probabilities = ((logits - logits.max()) / sampling.temperature).softmax(0)
        drawn = self._random.random()
        if sampling.top_p >= 1:
            return _invert(probabilities.cumsum(0, dtype=torch.float64), drawn)
        likeliest, summed = _nucleus(probabilities, sampling.top_p)
        return int(likeliest[_invert(summed, drawn)])

    def accept(self, token: int) -> None:
        """The answer goes on with ``token``."""
        if self._constraint is not None:
            self._constraint.accept(token)

    def _pass(self, token: int) -> None:
        """As if ``token`` had been chosen here."""
        if self.sampling.temperature >= _GREEDY_BELOW:
            self._random.random()
        if self._constraint is not None:
            self._constraint.mask()  # which is worked out before the next token is told
            self._constraint.accept(token)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest likeliest tokens that hold ``top_p``, and their cumulative probabilities."""
    count = min(_FIRST_LIKELIEST, len(probabilities))
    while True:
        values, tokens = probabilities.topk(count)
        summed = values.cumsum(0, dtype=torch.float64)
        if summed[-1] >= top_p or count == len(probabilities):
            break
        count = min(8 * count, len(probabilities))
    last = min(int(torch.searchsorted(summed, top_p)), count - 1)
    return tokens[: last + 1], summed[: last + 1]


def _invert(summed: torch.Tensor, drawn: float) -> int:
    """The first place whose cumulative probability exceeds ``drawn``, in [0, 1), times the sum."""
    place = int(torch.searchsorted(summed, drawn * float(summed[-1]), right=True))
    # Rounding may lead behind the end, where tokens without probability can lie.
    return place if place < len(summed) else int(torch.searchsorted(summed, float(summed[-1])))


def choose_all(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int | EngineError]:
    """A token for each row of ``logits`` (rows, vocabulary); -1 where a row is not finite, an error where its
    constraint has failed."""
    # numpy looks through a row with wide instructions; torch's search for a place does not, and cost 5 % of a step.
    rows = logits.numpy()
    greedy = rows.argmax(1)
    best = rows[np.arange(len(rows)), greedy]
    tokens: list[int | EngineError] = greedy.tolist()
    # NaN comes before every number; minus infinity everywhere is as useless.
    for row, is_finite in enumerate(np.isfinite(best).tolist()):
        if not is_finite:
            tokens[row] = -1
        elif not choosers[row].is_plain:
            try:
                tokens[row] = choosers[row].choose(logits[row])
            except EngineError as error:  # of this row alone
                tokens[row] = error
    return tokens


def logprobs(logits: torch.Tensor, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Logprob of ``token`` and the ``top`` likeliest with theirs, for ``logits`` (vocabulary,)."""
    found = logits.log_softmax(0)
    values, tokens = found.topk(min(top, len(found)))
    return float(found[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True))
