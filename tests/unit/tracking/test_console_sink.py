import io
import re

import pytest
from rich.console import Console

from tunesmith.tracking.console import ConsoleSink
from tunesmith.tracking.events import Notice, Progress, RunFinished
from tunesmith.tracking.fanout import Fanout
from tunesmith.tracking.pace import Pace


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def screen(data: str) -> tuple[list[str], bool]:
    """What a terminal shows after ``data``, and whether its cursor is visible."""
    lines, row, column, cursor = [[]], 0, 0, True
    for parameter, command, char in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])", data):
        if command == "A":
            row -= int(parameter or 1)
        elif command == "K":
            assert parameter == "2"
            lines[row] = []
        elif command in ("h", "l"):
            assert parameter == "?25"
            cursor = command == "h"
        elif command:
            assert command == "m"
        elif char == "\n":
            row, column = row + 1, 0
            lines += [[]] * (row + 1 - len(lines))
        elif char == "\r":
            column = 0
        else:
            line = lines[row] + [" "] * (column + 1 - len(lines[row]))
            line[column] = char
            lines[row], column = line, column + 1
    return ["".join(line).rstrip() for line in lines], cursor


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    return Console(file=io.StringIO(), force_terminal=True, width=80, height=40, legacy_windows=False)


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def test_without_a_terminal_the_run_is_plain_lines(events):
    console, clock = plain_console(), Clock()
    with Fanout([ConsoleSink(console, clock)]) as sinks:
        for event in events:
            sinks.emit(event)
            clock.seconds += 1.0
    assert console.file.getvalue().splitlines() == [
        "method: LoRA, r 8, alpha 16",
        "data: train.jsonl, 160 rows",
        "flash attention is not available here",
        "scoring 1/2",
        "step 1/20  epoch 1/2  loss 1.9500  lr 1.00e-04  tokens/s 343  memory 1.50 GiB  ETA 0:00:17",
        "eval at step 10: loss 0.7500, perplexity 2.1170, exact match 40.0 % (best so far)",
        "saved outputs/run/checkpoints/step-000010 (0.50 s, the best so far)",
        # The clock moves a second an event: step 1 was at 3 s, step 10 at 12 s, step 11 at 16 s, and
        # ten steps took 13 s, so nine more take 11.7 s.
        "step 11/20  epoch 2/2  loss 1.4500  eval loss 0.7500  lr 1.00e-04  tokens/s 343  memory 1.50 GiB"
        "  ETA 0:00:12",
        "step 20/20  epoch 2/2  loss 1.0000  eval loss 0.7500  lr 1.00e-04  tokens/s 343  memory 1.50 GiB"
        "  ETA 0:00:00",
        "eval at step 20: loss 0.5000, perplexity 1.6487, exact match 80.0 % (best so far)",
        "saved outputs/run/checkpoints/step-000020 (0.50 s, the best so far)",
        "run finished after 20 steps in 0:01:05",
    ]


def test_plain_lines_come_at_most_every_ten_seconds(make):
    console, clock = plain_console(), Clock()
    sink = ConsoleSink(console, clock)
    sink.emit(make.started(total_steps=1000, header={}))
    for step in range(1, 301):
        sink.emit(make.step(step))
        clock.seconds += 0.25
    shown = [int(re.match(r"step (\d+)/", line)[1]) for line in console.file.getvalue().splitlines()]
    assert shown == [1, 41, 81, 121, 161, 201, 241, 281]


def test_foreign_text_is_shown_literally_and_without_control_characters(make):
    console = plain_console()
    sink = ConsoleSink(console, Clock())
    sink.emit(Notice("[red]x[/red] \x1b[31m\x07 " + "long " * 30 + "end"))
    text = console.file.getvalue()
    assert text == "[red]x[/red] \\x1b[31m\\x07 " + "long " * 30 + "end\n"


def test_on_a_terminal_bars_numbers_and_notices(terminal, events):
    clock = Clock()
    sink = ConsoleSink(terminal, clock)
    for event in events[:14]:  # to step 10 and its evaluation
        sink.emit(event)
        clock.seconds += 1.0
    sink.emit(Progress("generating [b]", 1, 4))
    sink._view._live.refresh()
    lines, cursor = screen(terminal.file.getvalue())
    assert not cursor
    assert lines[0].startswith("╭─ smollm2-135m-instruct-q4:annab:qwxyz ─")
    assert "method  LoRA, r 8, alpha 16" in lines[1]
    assert lines[4:6] == [
        "note: flash attention is not available here",
        "eval at step 10: loss 0.7500, perplexity 2.1170, exact match 40.0 % (best so far)",
    ]
    assert lines[6] == "loss 1.5000  eval loss 0.7500  lr 1.00e-04  tokens/s 343  memory 1.50 GiB"
    assert re.fullmatch(r"training +━+╺?━+ 10/20 \d:\d\d:\d\d epoch 1/2  ETA 0:00:09", lines[7])
    assert re.fullmatch(r"generating \[b\] ━+╺?━+ 1/4 .*", lines[8].rstrip())
    sink.close()
    assert screen(terminal.file.getvalue())[1]


def test_an_error_in_the_middle_leaves_a_clean_terminal(terminal, events):
    def run():
        with Fanout([ConsoleSink(terminal, Clock())]) as sinks:
            for event in events[:8]:
                sinks.emit(event)
            sinks.emit(Progress("scoring", 1, 2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    lines, cursor = screen(terminal.file.getvalue())
    assert cursor
    assert terminal._live_stack == []
    assert sum(line.startswith("training") for line in lines) == 1
    assert not any(line.startswith("scoring") for line in lines)
    assert lines[-1] == ""  # the shell's next line begins on a line of its own


def test_the_end_of_a_run_stops_the_display(terminal, events):
    sink = ConsoleSink(terminal, Clock())
    for event in events:
        sink.emit(event)
    lines, cursor = screen(terminal.file.getvalue())
    assert cursor
    assert lines[-2] == "run finished after 20 steps in 0:01:05"
    assert isinstance(events[-1], RunFinished)
    sink.close()


def test_a_console_that_cannot_be_written_does_not_stop_the_run(caplog):
    console = plain_console()
    console.file.close()
    sink = ConsoleSink(console, Clock())
    sink.emit(Notice("a"))
    sink.emit(Notice("b"))
    sink.close()
    assert len(caplog.records) == 1


def test_time_left_counts_evaluations_and_counts_down_within_a_step(make):
    clock = Clock()
    pace = Pace(clock)
    pace.started(make.started(total_steps=11))
    assert pace.seconds_left() is None
    pace.stepped(make.step(6, train_time_per_step=3.0))  # resumed: the first step seen is the sixth
    assert pace.seconds_left() == pytest.approx(15.0)
    clock.seconds += 10.0
    pace.stepped(make.step(7, train_time_per_step=3.0))
    assert pace.seconds_left() == pytest.approx(40.0)
    clock.seconds += 4.0
    assert pace.seconds_left() == pytest.approx(36.0)
    clock.seconds += 60.0
    assert pace.seconds_left() == pytest.approx(30.0)
