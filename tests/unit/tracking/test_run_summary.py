import io
import re

import pytest
from rich.console import Console

from tunesmith.tracking.events import SampleAnswer
from tunesmith.tracking.summary import print_summary


def shown(record, *, width=80, colour=False):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    print_summary(console, record)
    return console.file.getvalue()


def test_the_table_compares_base_and_tuned_with_intervals(make):
    lines = [" ".join(line.split()) for line in shown(make.record()).splitlines()]
    assert "exact match 10.0 % [4.0, 22.0] 82.0 % [69.0, 90.0] +72.0 points" in lines
    assert "loss 2.0000 0.5000 -1.5 (-75 %)" in lines
    assert "perplexity 7.3891 1.6487 -5.74 (-78 %)" in lines


def test_better_is_green_and_worse_is_red(make):
    record = make.record()
    assert re.search(r"\x1b\[32m *\+72\.0 points", shown(record, colour=True))
    worse = make.record(before=record.after, after=record.before)
    assert re.search(r"\x1b\[31m *-72\.0 points", shown(worse, colour=True))


def test_a_tuned_answer_is_green_only_where_it_is_the_expected_one(make):
    samples = (
        SampleAnswer("q", "good  answer", "x", "good answer\n"),
        SampleAnswer("q", "this", "x", "that"),
    )
    text = shown(make.record(samples=samples), colour=True)
    assert "\x1b[32mgood answer" in text
    assert "\x1b[32mthat" not in text
    assert "1 of 2 tuned answers equal the expected one." in text


def test_text_of_users_is_literal(make):
    samples = (SampleAnswer("[bold]p[/bold] \x1b[2J", "[red]e", "[/]", "t\x07"),)
    text = shown(make.record(samples=samples))
    for literal in ("[bold]p[/bold] \\x1b[2J", "[red]e", "[/]", "t\\x07"):
        assert literal in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [40, 80])
def test_the_path_stands_alone_whole_on_the_line_after_its_heading(make, width):
    path = "/data/[x]/" + "/".join(["a long folder name"] * 12) + "/best"
    lines = shown(make.record(best_checkpoint=path), width=width).splitlines()
    at = lines.index("Best checkpoint is stored in:")
    assert lines[at + 1] == path
    assert lines[at + 2] == "Eval loss: 0.5000, perplexity: 1.6487"
    assert at + 3 == len(lines)


def test_nothing_but_the_path_is_wider_than_eighty_columns(make):
    samples = (SampleAnswer("word " * 300, "x" * 500, None, "y " * 400),) * 4
    text = shown(make.record(samples=samples, best_checkpoint="short"))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("Sample ") == 3
    assert "+1,199 characters" in text


def test_a_run_without_scores_samples_or_checkpoint_says_so(make):
    record = make.record(before=None, after=None, samples=(), best_checkpoint=None, status="failed")
    assert shown(record).strip() == "No checkpoint was saved (run failed)."
