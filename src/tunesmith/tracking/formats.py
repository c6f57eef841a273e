"""How numbers, times, sizes and foreign text are shown to people: console, summary and report alike."""

import math
from dataclasses import dataclass

from tunesmith.tracking.events import Score

ABSENT = "-"  # a number that was not measured stays absent


def number(value: float | None) -> str:
    """A loss or perplexity: ``1.2345``, ``1,234.5``, from a million on ``1.234e+06``."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 100:
        return f"{value:.4f}"
    return f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.3e}"


def count(value: float | None) -> str:
    """A count or a rate, rounded to a whole, with thousands apart: ``12,345``."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def size(value: float | None) -> str:
    """Bytes in binary units: ``1.25 GiB``."""
    if value is None:
        return ABSENT
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {unit}" if unit == "GiB" else f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds as a clock from a minute on: ``0.42 s``, ``12.3 s``, ``1:02:03``."""
    if seconds is None:
        return ABSENT
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    return clock(seconds)


def clock(seconds: float) -> str:
    """Whole seconds as ``h:mm:ss``."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def metric_label(name: str) -> str:
    """``exact_match`` as people write it: ``exact match``."""
    return name.replace("_", " ")


def fraction(value: float | None) -> str:
    """A task metric between 0 and 1 as per cent; any other as a number."""
    if value is None or not 0 <= value <= 1:
        return number(value)
    return f"{100 * value:.1f} %"


def visible(text: str) -> str:
    """``text`` without characters that steer a terminal; newlines stay, tabs become a blank.

    A control character becomes its escape (``\\x1b``), a lone surrogate a question mark, so foreign
    text can neither move the cursor nor fail to be written.
    """
    kept = []
    for char in text.replace("\r\n", "\n").replace("\t", " "):
        code = ord(char)
        if char != "\n" and (code < 0x20 or 0x7F <= code < 0xA0):
            kept.append(f"\\x{code:02x}")
        elif 0xD800 <= code < 0xE000:
            kept.append("?")
        else:
            kept.append(char)
    return "".join(kept)


def shorten(text: str, limit: int) -> str:
    """``text`` cut to ``limit`` characters, saying how many are left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} ... (+{len(text) - limit:,} characters)"


def same_answer(expected: str, answer: str | None) -> bool:
    """Whether two texts are equal once every run of whitespace counts as one blank."""
    return answer is not None and expected.split() == answer.split()


@dataclass(frozen=True)
class Comparison:
    """One line of the before/after table. ``better`` is None where there is nothing to compare."""

    label: str
    before: str
    after: str
    change: str
    better: bool | None


def compare(before: Score | None, after: Score | None) -> list[Comparison]:
    """The lines of the before/after table: the task metric where there is one, loss, perplexity.

    Metrics count as better when higher, loss and perplexity when lower.
    """
    lines = []
    metric = next((score.metric for score in (after, before) if score and score.metric), None)
    if metric is not None:
        old, new = (score if score and score.metric == metric else None for score in (before, after))
        first, last = (score.value if score else None for score in (old, new))
        change, better = "", None
        if first is not None and last is not None:
            unit = 0 <= first <= 1 and 0 <= last <= 1
            change = f"{100 * (last - first):+.1f} points" if unit else f"{last - first:+.4g}"
            better = None if last == first else last > first
        lines.append(Comparison(metric_label(metric), metric_text(old), metric_text(new), change, better))
    for label in ("loss", "perplexity"):
        first, last = (getattr(score, label) if score else None for score in (before, after))
        change, better = "", None
        if first is not None and last is not None and math.isfinite(first) and math.isfinite(last):
            share = f" ({100 * (last - first) / first:+.0f} %)" if first else ""
            change = f"{last - first:+,.4g}{share}"
            better = None if last == first else last < first
        lines.append(Comparison(label, number(first), number(last), change, better))
    return lines


def metric_text(score: Score | None) -> str:
    """A score's metric with its 95 % interval: ``82.0 % [75.1, 87.4]``."""
    if score is None or score.value is None:
        return ABSENT
    if score.interval is None:
        return fraction(score.value)
    low, high = score.interval
    if 0 <= low <= high <= 1 and 0 <= score.value <= 1:
        return f"{fraction(score.value)} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{number(score.value)} [{number(low)}, {number(high)}]"
