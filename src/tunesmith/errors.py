"""Every error a user can meet, as one tree.

    TunesmithError                 exit code 1
    ├── UserError                  exit code 2: something the user can mend; nothing was trained
    │   ├── ConfigError            a setting: unknown, of the wrong type, contradictory
    │   ├── DataError              rows of a data file that break a rule
    │   ├── ModelError             a base model or adapter that cannot be found, read or combined
    │   └── OutputError            a place that cannot be written
    ├── RunError                   exit code 3: the run had to stop; what was saved stays good
    │   ├── NonFiniteError         loss or gradient became NaN or infinite
    │   └── CheckpointError        a checkpoint could not be saved, or is damaged
    └── Interrupted                exit code 130: Ctrl-C or SIGTERM, after saving

A message is one line that names place, fault and remedy: ``configs/my.yaml line 14: no setting
lerning_rate; closest is learning_rate``. Only ``DataError`` adds a list below that line, and only
our own text breaks lines: what a user's file holds is escaped.
"""

import json
from typing import Any

_LONGEST_VALUE = 60


def printable(text: str) -> str:
    """``text`` with line breaks, control and direction characters and lone surrogates escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_value(value: Any) -> str:
    """A value of a file as it stands in a message: JSON on one printable line, shortened."""
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


class TunesmithError(Exception):
    """Base of all errors that are shown to a user without a traceback.

    Args:
        place: where the fault lies: a file and line, a path, a setting.
        fault: what is wrong there.
        remedy: what the user can do; may be empty when the fault says it.
    """

    exit_code = 1

    def __init__(self, place: str, fault: str, remedy: str = "") -> None:
        super().__init__(place, fault, remedy)
        self.place = place
        self.fault = fault
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.place}: {self.fault}" if self.place else self.fault
        text = f"{text}; {self.remedy}" if self.remedy else text
        return "\n".join(map(printable, text.split("\n")))


class UserError(TunesmithError):
    """Something the user can mend before anything is trained."""

    exit_code = 2


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """Rows that break a rule, or a data file that cannot be read."""


class ModelError(UserError):
    """A base model, tokenizer or adapter that cannot be found, read or combined."""


class OutputError(UserError):
    """A place that cannot be written."""


class RunError(TunesmithError):
    """The run had to stop; what was saved before stays good."""

    exit_code = 3


class NonFiniteError(RunError):
    """Loss or gradient became NaN or infinite; the optimizer was not stepped."""


class CheckpointError(RunError):
    """A checkpoint could not be saved, or one on disk is damaged."""


class Interrupted(TunesmithError):
    """Ctrl-C or SIGTERM, after the last complete step was saved."""

    exit_code = 130
