"""Answers held to a form: a grammar becomes masks over the vocabulary, by llguidance.

The grammar works on bytes, so it fits any byte-level or byte-fallback tokenizer, whatever its tokens cut apart. What
may come next is worked out in a thread of its own, from the moment a token is chosen: the next forward pass runs
meanwhile. llguidance bounds the work of compiling and of each step; past that the request fails, and no other.
"""

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.problems import shorten
from tunesmith.serving.chat import Voice
from tunesmith.serving.faults import Refusal, bad_request
from tunesmith.serving.seam import Constraint, EngineError

MAX_SCHEMA_CHARACTERS = 65_536
_KEPT = 32  # compiled grammars of one tokenizer
_SEARCH_SECONDS = 1.0  # for the place of a fault
_MOST_OF_FAULT = 300
_INTRICATE = "the form that the answer has to have is too intricate"
# llguidance bounds its memory; compiling these takes time with their product, and no thread can be ended.
_MOST_MULTIPLES = 100_000  # places times the least common multiple: 1-3 s
_MOST_PAIRS = 10_000  # of a pattern and another name of one object, which must not overlap: 1 s

# White space is where JSON has it, but no model may write nothing else for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}


@dataclass(frozen=True)
class Form:
    """What answers must look like.

    Attributes:
        grammar: llguidance's, as text.
        place: the part of the request that asks for it.
        schema: what the grammar was made of, where it is a JSON schema.
    """

    grammar: str
    place: str
    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Begin:
    """Begins the constraint of an answer. From the form another process makes its own; the matcher stays here."""

    form: Form
    vocabulary: int
    stop_ids: frozenset[int]
    end: int
    matcher: Any = field(repr=False)

    def __call__(self) -> Constraint:
        """Of a new answer."""
        return Held(self.matcher.deep_copy(), self.vocabulary, self.end, self.stop_ids)


def json_form(schema: dict[str, Any], place: str) -> Form:
    """The form of JSON that a schema describes.

    Raises:
        Refusal: 400: it is too long, or is for another purpose.
    """
    check_schema(schema, place)
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
    except ValueError as error:  # whole numbers past 64 bits
        raise _bad(place, "a number in it is too large") from error
    return Form(grammar, place, schema)


def check_schema(schema: dict[str, Any], place: str) -> None:
    """Refuse (400) a schema that is too long, or that would loosen what it is held to."""
    characters = len(json.dumps(schema, ensure_ascii=False))
    if characters > MAX_SCHEMA_CHARACTERS:
        raise _bad(place, f"has {characters:,} characters, {MAX_SCHEMA_CHARACTERS:,} are the most")
    if "x-guidance" in schema:
        raise _bad(place, "x-guidance is not supported; leave it out")
    counts = _Counts()
    _count(schema, counts)
    if counts.pairs > _MOST_PAIRS:
        raise _bad(place, "has too many patternProperties; list the properties")
    if counts.multiples() > _MOST_MULTIPLES:
        raise _bad(place, "has multipleOf with numbers too large or in too many places; leave some out")


@dataclass
class _Counts:
    """What of a schema takes long to compile."""

    numbers: set[Decimal] = field(default_factory=set)  # of multipleOf
    places: int = 0  # with a multipleOf, or that may lead to one
    is_merged: bool = False  # where schemas are merged, a number may have to be a multiple of several
    pairs: int = 0

    def multiples(self) -> int:
        """The states of counting to every multiple, at most."""
        if not self.numbers:
            return 0
        scale = -min(int(number.as_tuple().exponent) for number in self.numbers)
        whole = [int(number.scaleb(max(scale, 0))) for number in self.numbers]
        least = math.lcm(*whole) if self.is_merged else max(int(n.scaleb(_digits(n))) for n in self.numbers)
        return least * self.places


def _digits(number: Decimal) -> int:
    """After the point."""
    return max(-int(number.as_tuple().exponent), 0)


def _count(value: Any, counts: _Counts) -> None:
    """Whatever looks like a part of a schema counts as one; nesting is bounded by the parser of requests."""
    if isinstance(value, list):
        for item in value:
            _count(item, counts)
    if not isinstance(value, dict):
        return
    multiple = value.get("multipleOf")
    if isinstance(multiple, int | float) and not isinstance(multiple, bool) and 1e-9 < multiple < 1e15:
        counts.numbers.add(Decimal(repr(multiple)))
        counts.places += 1
    elif "$ref" in value:
        counts.places += 1
    counts.is_merged |= "allOf" in value or "$ref" in value
    patterns, names = value.get("patternProperties"), value.get("properties")
    if isinstance(patterns, dict):
        counts.pairs += len(patterns) * (len(patterns) + (len(names) if isinstance(names, dict) else 0))
    for item in value.values():
        _count(item, counts)


def constraint_for(form: Form, voice: Voice, vocabulary: int, stop_ids: frozenset[int]) -> Begin:
    """What begins the constraint of each answer.

    Args:
        form: of the answers.
        voice: whose tokens they are.
        vocabulary: of the engine.
        stop_ids: tokens that end an answer; at least one.

    Raises:
        Refusal: 400: the form cannot be held to, with the place in the schema; or this model's tokenizer is of a
            kind that cannot be.
    """
    with _LOCK:
        per_voice = _GRAMMARS.setdefault(voice, {})
        grammars = per_voice.get(vocabulary)
        if grammars is None:
            grammars = per_voice[vocabulary] = Grammars(voice.tokenizer, vocabulary)
    matcher = grammars.compiled(form)
    return Begin(form, vocabulary, stop_ids, int(voice.tokenizer.eos_token_id), matcher)


class Grammars:
    """Grammars compiled for one tokenizer; safe to use from several threads."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._source, self._vocabulary = tokenizer, vocabulary
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def compiled(self, form: Form) -> Any:
        """A matcher at the beginning, to be copied; Refusal (400) as of ``constraint_for``."""
        from llguidance import LLMatcher

        with self._lock:
            tokenizer = self._tokenizer
            matcher = self._kept.get(form.grammar)
            if matcher is not None:
                self._kept.move_to_end(form.grammar)
                return matcher
        matcher = LLMatcher(tokenizer, form.grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise self._refusal(form, matcher.get_error())
        with self._lock:
            self._kept[form.grammar] = matcher
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return matcher

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance import hf

        size = max(len(self._source), self._vocabulary)
        try:
            return hf.from_tokenizer(self._source, n_vocab=size, eos_token=int(self._source.eos_token_id))
        except Exception as error:  # the library's own kinds
            raise bad_request("response_format: this model's tokenizer is of a kind that cannot be held to a form",
                              "response_format") from error  # fmt: skip

    def _refusal(self, form: Form, error: str) -> Refusal:
        place = form.place
        if form.schema is not None:
            place += _place_of(error, form.schema, self._fault, time.monotonic() + _SEARCH_SECONDS)
        return _bad(place, _plain(error))

    def _fault(self, schema: dict[str, Any]) -> str:
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
        return str(LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits()).get_error())


class Held:
    """``Constraint`` of one answer.

    Args:
        matcher: llguidance's, of this answer alone.
        vocabulary: of the engine.
        end: the token that is llguidance's end of a text.
        stop_ids: the tokens that may come where the grammar has all it needs, and nowhere else.
    """

    def __init__(self, matcher: Any, vocabulary: int, end: int, stop_ids: frozenset[int]) -> None:
        self._matcher, self._vocabulary, self._end = matcher, vocabulary, end
        self._stops = np.array(sorted(stop for stop in stop_ids if stop < vocabulary), np.int64)
        self._next: Future[NDArray[np.bool_]] = _THREADS.submit(self._mask)

    def mask(self) -> NDArray[np.bool_]:
        """See ``Constraint``."""
        try:
            return self._next.result()
        except EngineError:
            raise
        except BaseException as error:  # where Rust gives up, PyO3 raises no Exception; others' answers go on
            raise EngineError(_INTRICATE) from error

    def accept(self, token: int) -> None:
        """See ``Constraint``."""
        self._next = _THREADS.submit(self._mask_after, token)

    def _mask_after(self, token: int) -> NDArray[np.bool_]:
        self._matcher.consume_token(token)
        return self._mask()

    def _mask(self) -> NDArray[np.bool_]:
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise EngineError(_INTRICATE)
        mask = np.unpackbits(packed, bitorder="little")[: self._vocabulary].astype(np.bool_)
        # llguidance knows one end of a text; a model has several, and may use any of them.
        mask[self._end : self._end + 1] = False  # it may lie past the tokens that have logits
        mask[self._stops] = self._matcher.is_accepting()
        return mask


def _place_of(
    error: str, schema: dict[str, Any], fault: Callable[[dict[str, Any]], str], until: float
) -> str:
    """Where in the schema the fault is: down to the smallest part that alone is refused in the same words."""
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    place, part = "", schema
    while True:
        for name, inner in _parts(part):
            if time.monotonic() < until and fault({**shared, **inner}) == error:
                place, part = f"{place}.{name}", inner
                break
        else:
            return place


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas right inside a schema, with their places."""
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            yield from (
                (f"{key}.{shorten(n)}", inner) for n, inner in value.items() if isinstance(inner, dict)
            )
        elif key in ("items", "additionalProperties", "additionalItems", "not") and isinstance(value, dict):
            yield key, value
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems", "items") and isinstance(value, list):
            yield from ((f"{key}.{n}", inner) for n, inner in enumerate(value) if isinstance(inner, dict))


def _bad(place: str, fault: str) -> Refusal:
    return bad_request(f"{place}: {fault}", place.partition(".")[0], "invalid_schema")


def _plain(error: str) -> str:
    lines = error.strip().splitlines() or ["cannot be held to"]
    # Of a regular expression's fault the first line says only that there is one.
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return shorten(said, most=_MOST_OF_FAULT)


def _limits() -> Any:
    from llguidance import LLParserLimits

    # States take 1-2 kB each; verbose errors would repeat the grammar.
    return LLParserLimits(max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False)


_GRAMMARS: WeakKeyDictionary[Voice, dict[int, Grammars]] = WeakKeyDictionary()
_LOCK = threading.Lock()
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="masks")
