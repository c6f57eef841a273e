"""What is wrong with a row, in words fit for a terminal, and the list of it that a user gets."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from tunesmith.errors import DataError, printable

LISTED_PROBLEMS = 20
_EXCERPT = 60
_EXCERPT_LEAD = 20


class BrokenRule(Exception):
    """The rule that a row breaks and the offending text, before file and line are added."""

    def __init__(self, rule: str, text: str = "") -> None:
        super().__init__(rule, text)
        self.rule = rule
        self.text = text


@dataclass(frozen=True, slots=True)
class Problem:
    """One row that breaks a rule; ``text`` is the offending text, printable and shortened."""

    file: str
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        place = f"{printable(self.file)}:{self.line}: {self.rule}"
        return f"{place}: {self.text}" if self.text else place


class ProblemList:
    """Counts the problems of a data set and keeps the first 20 of them."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.total = 0

    def add(self, problem: Problem) -> None:
        """Count ``problem``; keep it if it is among the first 20."""
        self.total += 1
        if len(self.first) < LISTED_PROBLEMS:
            self.first.append(problem)

    def raise_if_any(self, path: str) -> None:
        """Raise a DataError that lists the first problems below its one line, if there are any."""
        if not self.total:
            return
        fault = "1 row breaks a rule" if self.total == 1 else f"{self.total:,} rows break a rule"
        listed = [f"\n  {problem}" for problem in self.first]
        if self.total > len(self.first):
            listed.append(f"\n  … and {self.total - len(self.first):,} more")
        remedy = "mend it" if self.total == 1 else "mend them"
        raise DataError(printable(path), fault, f"{remedy} or pass --skip-bad-rows{''.join(listed)}")


def shorten(text: str, at: int = 0, most: int = _EXCERPT) -> str:
    """About ``most`` printable characters of ``text`` around index ``at``, with … where it was cut."""
    start = max(0, at - _EXCERPT_LEAD)
    piece = printable(text[start : start + most])
    cut_after = len(piece) > most or len(text) > start + most
    return ("…" if start else "") + piece[:most] + ("…" if cut_after else "")


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like ``name`` regardless of case, or None where none is alike."""
    by_lower = {item.lower(): item for item in known}
    # Longer names cannot be misspellings, and comparing them would take quadratic time.
    found = get_close_matches(name.lower()[:200], by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None
