"""``docs/configuration.md``, rendered from the sections of ``schema.py``.

Run ``python -m tunesmith.config.reference > docs/configuration.md`` whenever a setting changes; a test holds the
committed page against what this module renders, so it cannot fall behind.
"""

import json
import re
import shlex
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from string import Template
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from tunesmith.config.load import DEFAULT_LEARNING_RATE, load_config
from tunesmith.config.lora_keys import LORA_CONFIG_KEYS, LORA_DEFAULTS
from tunesmith.config.reference_text import (
    AFTER_SETTINGS,
    BEFORE_FAULTS,
    BEFORE_SETTINGS,
    FAULTS,
    LORA_TEXT,
    MEANINGS,
    TITLES,
)
from tunesmith.config.schema import FLAT_SECTIONS, Section
from tunesmith.errors import ConfigError

_TYPE_NAMES: Mapping[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    type(None): "`null`",
}


def render() -> str:
    """The whole page, in Markdown.

    Raises:
        KeyError: a setting has no entry in ``MEANINGS``.
    """
    parts = [
        Template(BEFORE_SETTINGS).substitute({k: _yaml(rate) for k, rate in DEFAULT_LEARNING_RATE.items()}),
        BEFORE_FAULTS,
        _faults(),
        "## Every setting",
        "A setting written `a.b` is `b` inside the group `a`. `null` means: as if the line were not there.",
    ]
    for name, section in FLAT_SECTIONS.items():
        parts += [f"### {TITLES[name]}", _table(setting_rows(section))]
    parts += [LORA_TEXT, _lora_table(), _other_lora_keys(), AFTER_SETTINGS]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def setting_rows(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted key, type, meaning, default and its reason) of each setting, groups before what is in them."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        meaning = MEANINGS[key] if key in MEANINGS or not _is_described(field) else str(field.description)
        yield key, _type(field.annotation, field.metadata), meaning, _default(field)
        for group in _groups(field.annotation):
            yield from setting_rows(group, f"{key}.")


def _is_described(field: FieldInfo) -> bool:
    # A required setting has no default to give a reason for: its description says what it is.
    return field.is_required() and field.description is not None


def _groups(annotation: Any) -> Iterator[type[Section]]:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            yield candidate


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    names = list(dict.fromkeys(_type_names(annotation, metadata)))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _type_names(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _type_names(arguments[0], _constraints(arguments[1:]))
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _type_names(argument, ())
    elif origin is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin is tuple:
        many = arguments[-1] is Ellipsis
        yield "list of texts" if many and arguments[0] is str else f"list of {len(arguments)} numbers"
    elif origin is Mapping or (isinstance(annotation, type) and issubclass(annotation, Section)):
        yield "group"
    else:
        yield _TYPE_NAMES[annotation] + _bounds(metadata)


def _constraints(metadata: Sequence[Any]) -> list[Any]:
    return [c for item in metadata for c in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bounds(metadata: Sequence[Any]) -> str:
    words = []
    for item in metadata:
        if isinstance(item, annotated_types.Gt):
            words.append(f"> {item.gt}")
        elif isinstance(item, annotated_types.Ge):
            words.append(f">= {item.ge}")
        elif isinstance(item, annotated_types.Lt):
            words.append("< 2^63" if item.lt == 2**63 else f"< {item.lt}")
        elif isinstance(item, annotated_types.MinLen):
            words.append("not empty")
    return f" ({', '.join(words)})" if words else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value, reason = field.default, field.description
    if isinstance(value, Section):
        return str(reason)
    return f"not set: {reason}" if value is None else f"`{_yaml(value)}`: {reason}"


def _yaml(value: Any) -> str:
    """A default as one would write it in the file."""
    if isinstance(value, float) and 0 < value < 1e-3:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_./-]+", value):
        return value
    return json.dumps(value)


def _table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    lines = ["| setting | type | meaning | default, and why |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {meaning} | {default} |" for key, kind, meaning, default in rows]
    return "\n".join(lines)


def _faults() -> str:
    lines = []
    for override in FAULTS:
        try:
            load_config(None, ["model_id=m", "train_path=rows.jsonl", override])
        except ConfigError as error:
            lines += [f"$ tunesmith check my.yaml --set {shlex.quote(override)}", f"Error: {error}"]
        else:
            raise AssertionError(f"{override} is meant to show a fault, but it loads")
    return "```console\n" + "\n".join(lines) + "\n```"


def _lora_table() -> str:
    lines = ["| setting | default here |", "|---|---|"]
    lines += [f"| `lora_config.{key}` | `{value}` |" for key, value in LORA_DEFAULTS.items()]
    targets = "all linear layers, the input embeddings and the head of the model at hand"
    return "\n".join([*lines, f"| `lora_config.target_modules` | {targets} |"])


def _other_lora_keys() -> str:
    others = [key for key in LORA_CONFIG_KEYS if key not in LORA_DEFAULTS and key != "target_modules"]
    return "The other keys keep PEFT's defaults: " + ", ".join(f"`{key}`" for key in others) + "."


if __name__ == "__main__":
    sys.stdout.write(render())
