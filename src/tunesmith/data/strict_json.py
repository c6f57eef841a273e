"""JSON as RFC 8259 has it, where ``json.loads`` is lenient, with errors a person can act on.

Refused beyond syntax: a key written twice, NaN and Infinity (also as an overflow such as 1e999), nesting
deeper than ``MAX_NESTING``, U+0000 and lone surrogates inside texts: tokenizers and chat templates
drop or break on the last three.
"""

import json
import math
import re

from tunesmith.data.problems import BrokenRule, shorten

MAX_NESTING = 100


def parse_json(text: str) -> object:
    """The value written in ``text``; BrokenRule, with a column counted from 1, where it is not JSON."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BrokenRule(_syntax_rule(text, error), shorten(text, error.pos)) from None
    except RecursionError:
        raise BrokenRule(_TOO_DEEP, shorten(text)) from None
    except ValueError:  # Python's limit on the digits of an integer
        raise BrokenRule("a number has too many digits", shorten(text)) from None
    if not _is_surely_clean(text):
        _check_value(value)
    return value


def json_type(value: object) -> str:
    """What JSON calls ``value``, with its article: ``a list``, ``null``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
    }
    return names[type(value)]


def excerpt(value: object) -> str:
    """A decoded value as short JSON for an error."""
    return shorten(json.dumps(value, ensure_ascii=False))


def require_text(where: str, value: object) -> str:
    """``value`` if it is a text with more than white space in it; BrokenRule naming ``where`` if not."""
    if not isinstance(value, str):
        raise BrokenRule(f"{where} must be text, not {json_type(value)}", excerpt(value))
    if not value.strip():
        raise BrokenRule(f"{where} is empty", shorten(value))
    return value


def optional_text(where: str, value: object) -> str | None:
    """As ``require_text``, but null stays None."""
    return None if value is None else require_text(where, value)


_TOO_DEEP = f"JSON is nested deeper than {MAX_NESTING} levels"


def _syntax_rule(text: str, error: json.JSONDecodeError) -> str:
    column = error.pos + 1
    if error.pos >= len(text.rstrip()):
        return f"JSON is incomplete, it stops at column {column}: a row is one whole line"
    if text.startswith("\ufeff", error.pos):
        return f"byte order mark inside the file at column {column}"
    if text.startswith("'", error.pos):
        return f'JSON text stands in double quotes ("), not single ones, at column {column}'
    if text.startswith(("True", "False", "None"), error.pos):
        return f"JSON writes true, false and null, not Python's names, at column {column}"
    if error.msg == "Extra data":
        return f"more text after the JSON value at column {column}: a line holds one row"
    cause = error.msg.removesuffix(" at").removesuffix(" starting").replace("Expecting", "expected")
    return f"not JSON at column {column}: {cause[0].lower()}{cause[1:]}"


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BrokenRule(f'key "{shorten(key)}" is written twice in one object')
            seen.add(key)
    return found


def _no_constant(name: str) -> float:
    raise BrokenRule(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise BrokenRule("a number is too large", shorten(digits))
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)


# The escapes of U+0000 and of surrogates, which are all that can put these into a text read from UTF-8.
_SUSPECT_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


def _is_surely_clean(text: str) -> bool:
    """Whether JSON written as ``text`` cannot break a rule of ``_check_value``; nearly all rows, at a glance."""
    if text.count("{") + text.count("[") > MAX_NESTING or _SUSPECT_ESCAPE.search(text):
        return False
    try:  # unescaped, as in a text that was itself inside JSON
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_value(value: object) -> None:
    """Depth and texts of the whole value, without recursion."""
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            _check_text(item)
        elif isinstance(item, dict | list):
            if depth > MAX_NESTING:
                raise BrokenRule(_TOO_DEEP)
            children = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            waiting.extend((child, depth + 1) for child in children)


def _check_text(text: str) -> None:
    if "\0" in text:
        raise BrokenRule("text contains the character U+0000", shorten(text, text.index("\0")))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise BrokenRule(
            f"text contains half a surrogate pair, U+{code:04X}", shorten(text, error.start)
        ) from None
