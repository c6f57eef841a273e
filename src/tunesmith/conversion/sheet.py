"""One conversion in the making: another tool's settings, and what becomes of each.

Every key ends in one of three ways: it is carried to settings of ours, it has nothing to say here, or it is lost
and reported with what it means there and what is nearest here. A value that is no value of its key is a fault.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.config.yaml_file import YamlFile
from tunesmith.errors import ConfigError, printable, shown_value

Handler = Callable[["Sheet", str, Any], None]
Kind = Literal["text", "whole", "count", "number", "flag", "names", "value"]

# What says that a switch is off, or that nothing is asked for.
OFF: tuple[Any, ...] = (None, False, 0, "", "none", "None", "no", [], {})


@dataclass(frozen=True)
class Tool:
    """Another tool's settings.

    ``handlers`` has every key that the tool knows. ``defaults`` are its own values, under its own names, where
    they differ from ours: they are carried like values of the file. ``assumed`` are further ones, by which other
    keys are understood. Of ``nulls`` an empty value is a value like any other, and not the default.
    """

    name: str
    title: str  # with the version whose keys the table has
    handlers: Mapping[str, Handler]
    defaults: Mapping[str, Any]
    assumed: Mapping[str, Any]
    trains_lora: Callable[["Sheet"], bool]
    nulls: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Finding:
    """What became of one key."""

    place: str
    key: str
    text: str

    def __str__(self) -> str:
        return printable(f"{self.place}: {self.key}: {self.text}")


class Sheet:
    """Filled by the handlers of ``tool``, key by key."""

    def __init__(self, tool: Tool, source: YamlFile) -> None:
        self.tool, self.name = tool, source.name
        self._source = source
        self.settings: dict[str, Any] = {}  # ours, by dotted name
        self.origins: dict[str, Finding] = {}  # of each of them
        self.lost: list[Finding] = []
        self.needless: list[Finding] = []
        self.faults: list[ConfigError] = []
        self.settled: set[str] = set()

    def is_given(self, key: str) -> bool:
        """Whether the file has a value for ``key``; an empty one is none."""
        return self._source.values.get(key) is not None

    def get(self, key: str) -> Any:
        """The file's value, else the tool's default, else None."""
        if self.is_given(key):
            return self._source.values[key]
        return self.tool.defaults.get(key, self.tool.assumed.get(key))

    def place(self, key: str) -> str:
        """``FILE line N`` of a key such as ``datasets[0].path``; the file alone for a default."""
        if key in self._source.values:
            return self._source.place((key,))
        parts = re.findall(r"[^.\[\]]+", key)
        return self._source.place(tuple(int(part) if part.isdigit() else part for part in parts))

    def label(self, key: str) -> str:
        """The key as it is shown, with a word on where its value comes from if not from the file."""
        shown = key if re.fullmatch(r"[\w.\[\]-]+", key) else json.dumps(key, ensure_ascii=False)
        is_in_file = key in self._source.values or key.partition("[")[0] in self._source.values
        return shown if is_in_file else f"{shown} (left out; {self.tool.name}'s default)"

    @property
    def trains_lora(self) -> bool:
        """Whether the file trains an adapter."""
        return self.tool.trains_lora(self)

    def carry(self, key: str, settings: Mapping[str, Any], note: str = "") -> None:
        """``key`` becomes ``settings`` of ours, by dotted name; ``note`` says what is not obvious about it."""
        self.settled.add(key)
        if settings and all(self.settings.get(setting, self) == value for setting, value in settings.items()):
            first = self.origins[next(iter(settings))]
            if first.key != self.label(key):  # of two keys for one setting both are to be found in the result
                self.pass_over(key, f"said with {first.key} already")
            return
        for setting, value in settings.items():
            if setting in self.settings and self.settings[setting] != value:
                first = self.origins[setting]
                self.fault(
                    key, f"and {first.key} ({first.place}) say different things of {setting}", "keep one"
                )
                continue
            self.settings[setting] = value
            self.origins.setdefault(setting, Finding(self.place(key), self.label(key), note))

    def lose(self, key: str, means: str, nearest: str) -> None:
        """``key`` cannot be carried: what it means there, and the nearest thing here."""
        self.settled.add(key)
        self.lost.append(Finding(self.place(key), self.label(key), f"{means}; here: {nearest}"))

    def pass_over(self, key: str, why: str) -> None:
        """``key`` has nothing to say here."""
        self.settled.add(key)
        self.needless.append(Finding(self.place(key), self.label(key), why))

    def fault(self, key: str, fault: str, remedy: str) -> None:
        """``key`` makes the file unusable, here or there too."""
        self.settled.add(key)
        self.faults.append(ConfigError(self.place(key), f"{self.label(key)} {fault}", remedy))

    def read(self, key: str, value: Any, kind: Kind) -> Any:
        """``value`` as ``kind``, or None after noting a fault.

        Other tools read YAML 1.1 and convert once more: ``yes`` and a number in quotes are values there.
        """
        found = _READERS[kind](value)
        if found is None:
            self.fault(key, f"is {shown_value(value)}; it should be {_WISHES[kind]}", "change the value")
        return found


def flag(value: Any) -> bool | None:
    """A switch, as YAML 1.1 has them; None where it is none."""
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    return True if word in ("yes", "on", "true") else False if word in ("no", "off", "false") else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def number(value: Any) -> float | int | None:
    """A finite number, also one in quotes or with YAML 1.1's underscores; None where it is none."""
    is_short = (
        isinstance(value, str) and len(value) <= 40
    )  # Python itself reads no number of thousands of digits
    if is_short and re.fullmatch(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?", value):
        plain = value.replace("_", "")
        value = int(plain) if re.fullmatch(r"[-+]?[0-9]+", plain) else float(plain)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e18 else None


def _whole(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and found == int(found) and found >= 0 else None


def _count(value: Any) -> int | None:
    return _whole(value) or None


def _names(value: Any) -> list[str] | None:
    """A list of names, or names with commas between."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return None
    return [part.strip() for part in parts if part.strip()] or None


_READERS: Mapping[Kind, Callable[[Any], Any]] = {
    "text": _text,
    "whole": _whole,
    "count": _count,
    "number": number,
    "flag": flag,
    "names": _names,
    "value": lambda value: value,
}
_WISHES: Mapping[Kind, str] = {
    "text": "a text",
    "whole": "a whole number, at least 0",
    "count": "a whole number above 0",
    "number": "a number",
    "flag": "true or false",
    "names": "a list of names",
    "value": "a value",
}


# Handlers that many keys share


def to(setting: str, kind: Kind, note: str = "") -> Handler:
    """The key is our ``setting``, with the same value."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        found = sheet.read(key, value, kind)
        if found is not None:
            sheet.carry(key, {setting: found}, note)

    return handle


def to_lora(setting: str, kind: Kind) -> Handler:
    """The key is ``lora_config.SETTING``; without an adapter it says nothing."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        if sheet.trains_lora:
            to(f"lora_config.{setting}", kind)(sheet, key, value)
        else:
            sheet.pass_over(key, "no adapter is trained")

    return handle


def needless(names: Sequence[str], why: str) -> dict[str, Handler]:
    """Keys that say nothing here, for one reason."""
    return dict.fromkeys(names, lambda sheet, key, _value: sheet.pass_over(key, why))


def lost(names: Sequence[str], means: str, nearest: str, off: Sequence[Any] = ()) -> dict[str, Handler]:
    """Keys that cannot be carried, for one reason, unless their value is off, or one of ``off``."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        if value in (*OFF, *off) or flag(value) is False:
            sheet.pass_over(key, "off")
        else:
            sheet.lose(key, means, nearest)

    return dict.fromkeys(names, handle)
