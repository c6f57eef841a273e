"""Child processes with a log, a time limit and a measured peak of memory."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.05
_ERROR_LINE = re.compile(r"^(?:[\w.]*(?:Error|Exception|Exit|Interrupt)\b|ERROR|error:|Error:)")
_URL = re.compile(r"\w+://\S+")


@dataclass(frozen=True)
class Finished:
    """How a child ended.

    Attributes:
        error: None where it ended well, else one line.
        seconds: from its start to its end.
        peak_rss_bytes: its highest resident memory, and that of children it waited for.
    """

    error: str | None
    seconds: float
    peak_rss_bytes: int


def run_child(
    command: Sequence[str], log: Path, *, limit_seconds: float, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run ``command`` with its output in ``log``; at the limit it is ended with all that it started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    timed_out = False
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            while not pid:
                if not timed_out and time.monotonic() - started > limit_seconds:
                    timed_out = True
                    os.killpg(child.pid, signal.SIGKILL)
                time.sleep(_POLL_SECONDS)
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            raise
    child.returncode = code = os.waitstatus_to_exitcode(status)  # wait4 has taken it from under Popen
    seconds = time.monotonic() - started
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    if timed_out:
        error: str | None = f"not done after {limit_seconds:.0f} s, ended"
    elif code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        error = f"{error_line(log)} ({how})"
    else:
        error = None
    return Finished(error, seconds, peak)


def error_line(log: Path) -> str:
    """The last line of a log that names an error, else its last line; fit to be published."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    named = [line for line in lines if _ERROR_LINE.match(line)]
    filled = [line for line in lines if line]
    return without_places((named or filled or ["no output"])[-1])[:300]


def without_places(text: str) -> str:
    """``text`` without addresses and this machine's folders."""
    return _URL.sub("<address>", text).replace(str(Path.home()), "~")
