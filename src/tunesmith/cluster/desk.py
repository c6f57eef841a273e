"""Where the workers of a run and the driver that started them leave messages for each other: a Ray actor.

The driver may be on another machine than the first worker, and a worker may be killed at any time. What has to outlive
it, such as the folder of the run, is kept here.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.tracking.events import RunRecord


@dataclass(frozen=True)
class News:
    """What has come in since the driver last looked.

    Attributes:
        text: what the first worker printed, with the codes of a terminal.
        begun: whether the first worker has begun.
        heeds: whether a stop is now looked for after each step.
        error: of ours; of several workers', the one of lowest rank.
        crash: the traceback of a fault of this program.
        record: of the finished run.
        folder: of the run, once there is one.
    """

    text: str = ""
    begun: bool = False
    heeds: bool = False
    error: TunesmithError | None = None
    crash: str | None = None
    record: RunRecord | None = None
    folder: Path | None = None


@dataclass
class Desk:
    """The messages themselves; every method is called from another process."""

    _text: list[str] = field(default_factory=list)
    _stop: str | None = None
    _starts: int = 0
    _failed: int | None = None  # rank
    _news: News = field(default_factory=News)

    def is_over(self) -> bool:
        """Whether the run has ended: a further set of workers has nothing to do."""
        return any((self._news.error, self._news.crash, self._news.record))

    def start(self) -> int:
        """Called by the first worker of each set of workers: how many sets there were before."""
        self._starts += 1
        self._change(begun=True)
        return self._starts - 1

    def open(self, folder: Path) -> None:
        """The run has a folder: a further set of workers goes on there."""
        self._change(folder=folder)

    def heeds(self, stops: bool) -> None:
        """Whether the workers now look for a stop after each step."""
        self._change(heeds=stops)

    def folder(self) -> Path | None:
        return self._news.folder

    def write(self, text: str) -> None:
        self._text.append(text)

    def fail(self, rank: int, error: TunesmithError) -> None:
        """The run ends with this error. All workers may have it: the first one's words say the most."""
        if self._failed is None or rank < self._failed:
            self._failed = rank
            self._change(error=error)

    def crash(self, trace: str) -> None:
        if self._news.crash is None:
            self._change(crash=trace)

    def finish(self, record: RunRecord) -> None:
        self._change(record=record)

    def ask_to_stop(self, signal_name: str) -> None:
        self._stop = signal_name

    def stop(self) -> str | None:
        """The signal that the driver got, or None."""
        return self._stop

    def news(self) -> News:
        text, self._text = "".join(self._text), []
        return replace(self._news, text=text)

    def _change(self, **values: object) -> None:
        self._news = replace(self._news, **values)  # type: ignore[arg-type]
