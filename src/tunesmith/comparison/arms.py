"""The ways to train that are compared: what ``--arms`` names, as settings of a run."""

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tunesmith.comparison.record import Arm
from tunesmith.config.lora_keys import LORA_CONFIG_KEYS, LORA_DEFAULTS
from tunesmith.config.yaml_file import parse_value
from tunesmith.errors import ConfigError

DEFAULT_ARMS = "full,lora"
_WORDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_TARGETS: Mapping[str, Sequence[str] | None] = MappingProxyType(
    {"all": None, "attention": _ATTENTION, "mlp": _MLP, "linear": (*_ATTENTION, *_MLP)}
)
_SHORT: Mapping[str, str] = MappingProxyType(
    {"alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
)


def parse_arms(texts: Sequence[str], lora_config: Mapping[str, Any] | None) -> tuple[Arm, ...]:
    """The arms that ``--arms`` names.

    ``full``; ``lora``, with the file's ``lora_config`` or the documented defaults; and LoRA with changes, which stand
    behind it: ``lora:r=16``, ``lora:r=16:alpha=32``, ``lora:targets=attention`` (or ``mlp``, ``linear`` for both,
    ``all`` for the default, or names joined by ``+``), ``lora:dora``, ``lora:rslora``, ``lora:KEY=VALUE`` for any key
    of ``lora_config``.

    Args:
        texts: each a list of arms separated by commas.
        lora_config: of the configuration; None where it has none.

    Raises:
        ConfigError: an arm is unknown, is named twice, or is alone.
    """
    names = [name.strip() for text in texts for name in _split(text)]
    arms = tuple(_arm(name, lora_config or {}) for name in names)
    for index, arm in enumerate(arms):
        same = [a.name for a in arms[:index] if (a.method, a.lora_config) == (arm.method, arm.lora_config)]
        if same:
            fault = f"{arm.name} trains the same as {same[0]}"
            raise ConfigError("--arms", fault, "leave one of them out")
    if len(arms) < 2:
        raise ConfigError("--arms", "names fewer than two arms", f"for example --arms {DEFAULT_ARMS}")
    return arms


def _split(text: str) -> list[str]:
    """Parts between commas; those in brackets separate nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _arm(name: str, lora_config: Mapping[str, Any]) -> Arm:
    method, *changes = name.split(":")
    if method == "full" and changes:
        raise ConfigError(f"--arms {name}", "full-parameter training has no settings", "write full")
    if method == "full":
        return Arm("full", "full-parameter", "full", None)
    if method != "lora":
        near = difflib.get_close_matches(method, ("full", "lora"), 1)
        remedy = f"closest is {near[0]}" if near else "known are full and lora"
        raise ConfigError(f"--arms {name}", f"no arm {method!r}", remedy)
    settings: dict[str, Any] = {**LORA_DEFAULTS, **lora_config}
    for text in changes:
        settings |= _change(text, name)
    settings = {key: value for key, value in settings.items() if value is not None}
    label = ", ".join(["LoRA", *(_label(text) for text in changes)])
    return Arm(name, label, "lora", settings)


def _change(text: str, arm: str) -> Mapping[str, Any]:
    if text in _WORDS:
        return _WORDS[text]
    short, equals, value = text.partition("=")
    key = _SHORT.get(short, short)
    if not equals or not value or key not in LORA_CONFIG_KEYS:
        known = (*_WORDS, *_SHORT, *LORA_CONFIG_KEYS)
        near = difflib.get_close_matches(short, known, 1)
        remedy = f"closest is {near[0]}" if near else "for example lora:r=16 or lora:dora"
        raise ConfigError(f"--arms {arm}", f"no LoRA setting {text!r}", remedy)
    if key != "target_modules" or value.startswith("["):
        return {key: parse_value(value, f"--arms {arm}")}
    if value in _TARGETS:
        chosen = _TARGETS[value]
        return {key: None if chosen is None else list(chosen)}
    return {key: value.split("+")}


def _label(change: str) -> str:
    words = {"dora": "DoRA", "rslora": "rsLoRA", "r": "r", "alpha": "alpha", "targets": ""}
    short, _, value = change.partition("=")
    if short == "targets":
        return {"all": "all layers", "linear": "linear layers"}.get(value, f"{value} only")
    return f"{words.get(short, short)} {value}".strip()
