"""Metrics that compare one answer with the expected one, each in [0, 1].

``METRICS`` maps the names a configuration may use to the functions.
"""

import difflib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tunesmith.errors import ConfigError, DataError

MetricFunction = Callable[[str, str], float]


@dataclass(frozen=True)
class Metric:
    """A named function ``(expected, answer) -> float`` in [0, 1]."""

    name: str
    function: MetricFunction
    is_proportion: bool  # every value is 0 or 1, so the mean is a proportion of successes


@dataclass(frozen=True)
class Record:
    """``func(attr[value], …)`` in normal form: two records mean the same if and only if they are equal.

    Names are casefolded; attributes are sorted, and so are the items of each value.
    """

    function: str
    attributes: tuple[tuple[str, tuple[str, ...]], ...]


class _Malformed(ValueError):
    """The text is not a record."""


def exact_match(expected: str, answer: str) -> float:
    """1.0 if both texts are equal once stripped and with runs of whitespace collapsed, else 0.0."""
    return float(_collapse(expected) == _collapse(answer))


def label_accuracy(expected: str, answer: str) -> float:
    """1.0 if the first lines of both texts are equal without regard to case, else 0.0.

    Blank lines and spaces before the first line are skipped; what follows it is not looked at, so a
    model that explains its label is not punished for it.
    """
    return float(_first_line(expected).casefold() == _first_line(answer).casefold())


def token_f1(expected: str, answer: str) -> float:
    """F1 of the words both texts share, as in SQuAD.

    Words are lower-cased, without ASCII punctuation and without the articles a, an, the. If either
    text has no words left, the value is 1.0 when both have none and 0.0 otherwise (SQuAD 2.0).

    Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016,
    section 6.1, and the evaluation script of SQuAD 2.0 (Rajpurkar, Jia and Liang, ACL 2018).
    """
    wanted, given = _squad_words(expected), _squad_words(answer)
    if not wanted or not given:
        return float(wanted == given)
    shared = (Counter(wanted) & Counter(given)).total()
    # 2PR / (P + R) with P = shared / given and R = shared / wanted, without dividing twice
    return 2 * shared / (len(wanted) + len(given))


def record_match(expected: str, answer: str) -> float:
    """1.0 if both texts are the same record, else 0.0; an answer that is no record scores 0.0.

    A record is either ``func(attr[value], attr[value], …)``, the notation of ViGGO (Juraska, Bowden and
    Walker, "ViGGO: A Video Game Corpus for Data-To-Text Generation in Open-Domain Conversation", INLG
    2019), compared as ``parse_record`` says, or a JSON object or array, compared as parsed JSON: the order
    of keys and the way a number is written do not matter, the order of arrays does.

    Raises:
        DataError: ``expected`` itself is no record, so that no answer could ever match.
    """
    if expected.lstrip().startswith(("{", "[")):
        wanted_json = _parse_json(expected)
        if wanted_json is None:
            raise _not_a_record(expected)
        given_json = _parse_json(answer)
        return float(given_json is not None and _same_json(wanted_json, given_json))
    wanted = parse_record(expected)
    if wanted is None:
        raise _not_a_record(expected)
    return float(wanted == parse_record(answer))


def parse_record(text: str) -> Record | None:
    """Parse ``func(attr[value], attr[value], …)`` into its normal form; None if ``text`` is anything else.

    - The names of the function and the attributes compare without regard to case, values with it.
    - The order of attributes does not matter; a repeated attribute counts as often as it is there.
    - A value runs to the bracket that closes it, so it may hold balanced brackets of its own. Commas
      outside those make it a list, whose order does not matter.
    - Whitespace around names, values and list items does not matter; inside them, runs are one space.
    """
    try:
        function, at = _read_name(text, 0, "(")
        attributes: list[tuple[str, tuple[str, ...]]] = []
        if not text[at:].lstrip().startswith(")"):
            while True:
                name, at = _read_name(text, at, "[")
                items, at = _read_value(text, at)
                attributes.append((name, tuple(sorted(items))))
                at = _skip_space(text, at)
                if text[at : at + 1] != ",":
                    break
                at += 1
        at = _skip_space(text, at)
        if text[at : at + 1] != ")" or text[at + 1 :].strip():
            raise _Malformed
    except _Malformed:
        return None
    return Record(function, tuple(sorted(attributes)))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("exact_match", exact_match, is_proportion=True),
            Metric("record_match", record_match, is_proportion=True),
            Metric("label_accuracy", label_accuracy, is_proportion=True),
            Metric("token_f1", token_f1, is_proportion=False),
        )
    }
)


def metric_named(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ConfigError: there is none; the message names the nearest one.
    """
    if name in METRICS:
        return METRICS[name]
    nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)
    raise ConfigError(
        "evaluation.metric",
        f"no metric {name}",
        f"closest is {nearest[0]}; known are {', '.join(METRICS)}",
    )


def _collapse(text: str) -> str:
    return " ".join(text.split())


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].rstrip() if lines else ""


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _not_a_record(expected: str) -> DataError:
    shown = expected if len(expected) <= 60 else f"{expected[:57]}..."
    return DataError(
        "evaluation.metric record_match",
        f"the expected answer {shown!r} is neither func(attr[value], ...) nor JSON",
        "use exact_match, token_f1 or label_accuracy, or mend the row",
    )


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _read_name(text: str, at: int, opening: str) -> tuple[str, int]:
    """The name that stands before ``opening``, normalised, and the place after ``opening``."""
    end = at
    while end < len(text) and text[end] not in "()[],":
        end += 1
    name = _collapse(text[at:end]).casefold()
    if not name or text[end : end + 1] != opening:
        raise _Malformed
    return name, end + 1


def _read_value(text: str, at: int) -> tuple[list[str], int]:
    """The items of the value that starts at ``at``, just after its bracket, and the place after it."""
    items: list[str] = []
    start, depth = at, 0
    for place in range(at, len(text)):
        letter = text[place]
        if letter == "[":
            depth += 1
        elif letter == "]" and depth:
            depth -= 1
        elif letter == "]" or (letter == "," and not depth):
            items.append(_collapse(text[start:place]))
            start = place + 1
            if letter == "]":
                return items, start
    raise _Malformed


def _parse_json(text: str) -> dict[str, Any] | list[Any] | None:
    """The JSON object or array that ``text`` is, or None.

    Stricter than ``json.loads``: NaN, Infinity and repeated keys are not JSON that two readers would
    understand alike.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):  # a model may well answer with a thousand opening brackets
        return None
    return value if isinstance(value, dict | list) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) != len(pairs):
        raise ValueError("repeated key")
    return keys


def _same_json(left: Any, right: Any) -> bool:
    """Equality of JSON values. Python's own ``==`` holds true to be 1; a loop has no depth limit."""
    pending = [(left, right)]
    while pending:
        a, b = pending.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                return False
            pending.extend((a[key], b[key]) for key in a)
        elif isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                return False
            pending.extend(zip(a, b, strict=True))
        elif isinstance(a, bool) != isinstance(b, bool) or a != b:
            return False
    return True
