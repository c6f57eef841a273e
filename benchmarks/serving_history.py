"""What each model name meant when, and so which answers to a request are right: pure, standard library only."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

ABSENT = None  # there is no such model


@dataclass
class History:
    """What a name has meant, by time in seconds; ``since`` is ordered."""

    since: list[float] = field(default_factory=list)
    meant: list[str | None] = field(default_factory=list)

    def change(self, at: float, *meanings: str | None) -> None:
        """From ``at`` on the name means the last of ``meanings``, having meant the others a moment before.

        A change takes time: what it leads to is noted when it begins, and once more, with what was before, when it
        has ended. In between the name may mean any of these.
        """
        self.since += [at] * len(meanings)
        self.meant += meanings

    def meanings(self, begin: float, end: float) -> set[str | None]:
        """Everything it meant at some time from ``begin`` to ``end``."""
        first = max(bisect_right(self.since, begin) - 1, 0)
        return set(self.meant[first : bisect_right(self.since, end)])


def verdict(status: int, text: str | None, meanings: set[str | None], answers: Mapping[str, str]) -> str:
    """What a reply to a well-formed request is.

    Args:
        status: of HTTP.
        text: the answer, None where there is none.
        meanings: of the name while the request ran.
        answers: the known answer of each meaning to this prompt.

    Returns:
        "right", "away" (404 of a name that may have meant nothing), "busy" (429), "server fault" or "wrong".
    """
    if status >= 500:
        return "server fault"
    if status == 429:
        return "busy"
    if status == 404 and ABSENT in meanings:
        return "away"
    right = {answers[meaning] for meaning in meanings if meaning is not None}
    return "right" if status == 200 and text in right else "wrong"
