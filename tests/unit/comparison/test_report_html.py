import dataclasses
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from comparison_records import record
from tunesmith.comparison.plots import plots, rate_text
from tunesmith.comparison.record import Arm, Difference, SampleAnswers, Verdict, from_json, to_json
from tunesmith.comparison.report_html import _differences, html_page, write_html
from tunesmith.errors import OutputError

HOSTILE = '</pre></main><script>alert(1)</script><img src=x onerror="alert(2)"> & {{ 7 * 7 }} \x1b[31m'


class Page(HTMLParser):
    """The page's tags, attributes and texts; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def text():
    return html_page(record())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_verdict_first_then_every_part_in_order(page, text):
    order = [
        "No difference shown on your 541 rows: 0.8 points, interval -1.9 to +3.4.",
        "many models to serve",
        "The arms",
        "Differences",
        "Loss curves",
        "Quality against learning rate",
        "Forgetting against gain",
        "Memory, time and size",
        "General text before and after",
        "Serving",
        "Sample answers",
        "All runs",
        "Settings and lineage",
    ]
    places = [text.index(f">{heading}<") for heading in order]
    assert places == sorted(places)
    assert page.tags.count("svg") == 4


def test_the_numbers_of_the_arms(page):
    rows = {row[0]: row for row in page.rows if len(row) == 11}
    assert rows["base, untuned"][2:4] == ["2.4131", "2.1 % [1.2, 3.7]"]
    assert rows["full-parameter"] == [
        "full-parameter", "1e-5", "0.1142 [0.1021, 0.1266]", "81.2 % [77.9, 84.2]", "3 (1 failed)", "0:12:21",
        "640", "3.08 GiB", "134,515,008 (100 %)", "513.1 MiB", "0.06998",
    ]  # fmt: skip
    assert rows["LoRA, r 64"][1] == "3e-4 (edge of the grid)"


def test_no_winner_where_the_interval_covers_zero(page):
    rows = [row for row in page.rows if row[:1] == ["full-parameter minus LoRA, r 8"]]
    assert [row[1:] for row in rows] == [
        ["record match", "+0.8 points", "-1.9 to +3.4", "541 x 3", "no difference shown"],
        ["eval loss", "-0.0031", "-0.0058 to -0.0004", "541 x 3", "full-parameter is better"],
        ["general loss", "+0.1600", "+0.1100 to +0.2200", "60 x 3", "LoRA, r 8 is better"],
    ]


def test_forgetting_serving_samples_runs_and_settings(page):
    forgotten = next(row for row in page.rows if row[:3] == ["full-parameter", "0", "shipped"])
    assert forgotten[3:7] == ["60", "3.7673", "3.9773", "+0.2100 [+0.1800, +0.2600]"]
    assert forgotten[7] == "66.7 % [57.8, 74.5]"
    assert ["LoRA, r 8", "2.4 s", "0.02 s", "9.3 MiB", "41.0", "36.5"] in page.rows
    assert page.texts.count("✓ as expected") == 2  # whitespace aside
    assert any("failed: step 12: the loss became NaN" in row for row in page.rows)
    assert ["optimizer.betas", "0.9, 0.999"] in page.rows
    assert ["ram", "16.00 GiB"] in page.rows
    assert ["valid_path", "-"] in page.rows


def test_one_file_that_loads_nothing(page, text):
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "action")
        assert not name.startswith("on")
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_pictures_are_xml_with_text_alternatives_and_ids_of_their_own(text):
    ids = []
    pictures = plots(record())
    assert len(pictures) == 4
    for picture in pictures:
        assert picture.svg in text
        root = ET.fromstring(picture.svg)
        space = "{http://www.w3.org/2000/svg}"
        title, described = root.find(f"{space}title"), root.find(f"{space}desc")
        assert root.get("role") == "img"
        assert root.get("aria-labelledby") == f"{title.get('id')} {described.get('id')}"
        assert described.text.endswith(".")
        own = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(own) == len(set(own))
        ids += own
        for target in re.findall(r'(?:url\(#|href="#)([^)"]+)', picture.svg):
            assert target in own
        # No colour of its own is left that would vanish on dark ground.
        assert "#000000" not in picture.svg
        assert not re.findall(r"#0[0-9a]0[0-9a-f]{3}", picture.svg)
    assert len(ids) == len(set(ids))


def test_pictures_name_arms_axes_and_units():
    curves, rates, forgetting, costs = (picture.svg for picture in plots(record()))
    for label in ("full-parameter", "LoRA, r 8", "LoRA, r 64"):
        assert f">{label}</text>" in curves
        assert f">{label}</text>" in forgetting
        assert f">{label}</text>" in costs
    assert ">full-parameter: 1e-5</text>" in rates
    assert ">LoRA, r 64: 3e-4</text>" in rates
    assert "Chosen: full-parameter 1e-5 with eval loss 0.1767;" in rates
    assert "full-parameter gained 79.1 and its general loss changed by +0.2200" in forgetting
    assert ">loss (nats per trained token)</text>" in curves
    assert ">gain in record match over the base (points)</text>" in forgetting
    for value in ("3.08 GiB", "0:12:21", "9.3 MiB", "940"):
        assert f">{value}</text>" in costs


def test_foreign_text_is_shown_and_never_acts():
    arm = Arm("lora", HOSTILE, "lora", {HOSTILE: HOSTILE})
    finished = record()
    hostile = record(
        name=HOSTILE,
        model_id=HOSTILE,
        arms=(finished.arms[0], arm, *finished.arms[2:]),
        samples=(SampleAnswers(HOSTILE, HOSTILE, HOSTILE, {"lora": HOSTILE, HOSTILE: HOSTILE}),),
        verdict=Verdict(HOSTILE, (HOSTILE,), ()),
        notes=(HOSTILE,),
        settings={HOSTILE: {HOSTILE: [HOSTILE]}},
        forgetting=tuple(dataclasses.replace(f, source=HOSTILE) for f in finished.forgetting),
        runs=tuple(dataclasses.replace(run, fault=HOSTILE) for run in finished.runs),
    )
    text = html_page(hostile)
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    shown = HOSTILE.replace("\x1b", "\\x1b")
    assert page.texts.count(shown) >= 8  # literally, control characters as escapes
    assert "49" not in re.findall(r"& (\d+) ", text)  # the template engine does not run it either
    assert "\x1b" not in text
    for picture in plots(hostile):
        ET.fromstring(picture.svg)


def test_equal_records_give_equal_bytes(text):
    assert html_page(from_json(to_json(record()))) == text
    code = (
        "from comparison_records import record; from tunesmith.comparison.report_html import html_page;"
        "import hashlib; print(hashlib.sha256(html_page(record()).encode()).hexdigest())"
    )
    tests = Path(__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tests
        ).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_an_unfinished_comparison_has_a_page_too():
    empty = record(
        status="interrupted",
        runs_done=1,
        verdict=None,
        base=None,
        sweep=(),
        runs=(),
        summaries=(),
        differences=(),
        forgetting=(),
        samples=(),
        metric=None,
        price_per_hour=None,
        task=None,
        notes=(),
    )
    text = html_page(empty)
    page = Page(text)
    assert "No verdict yet" in page.texts
    assert "interrupted: it goes on when the command is given again" in page.texts
    assert "svg" not in page.tags


def test_numbers_that_were_not_measured_stay_absent():
    full = record()
    nothing = dict.fromkeys(
        ("learning_rate", "eval_loss", "metric", "wall_seconds", "training_seconds", "tokens_per_second",
         "peak_memory_bytes", "trainable_parameters", "checkpoint_bytes", "training_cost", "serving")
    )  # fmt: skip
    summary = dataclasses.replace(full.summaries[0], **nothing, seeds=(), failed_runs=3)
    some = record(summaries=(summary, *full.summaries[1:]))
    rows = {row[0]: row for row in Page(html_page(some)).rows if len(row) == 11}
    assert rows["full-parameter"][1:] == ["-", "-", "-", "0 (3 failed)", "-", "-", "-", "-", "-", "-"]
    costs = plots(some)[-1].svg
    assert costs.count(">not measured</text>") == 4


def test_many_arms_are_told_apart():
    full = record()
    names = [f"lora:r={2**n}" for n in range(9)]
    arms = tuple(Arm(name, f"LoRA, r {2**n}", "lora", {"r": 2**n}) for n, name in enumerate(names))
    sweep = tuple(dataclasses.replace(full.sweep[0], arm=name) for name in names)
    runs = tuple(dataclasses.replace(full.runs[-1], arm=name) for name in names)
    summaries = tuple(dataclasses.replace(full.summaries[1], arm=name) for name in names)
    pictures = plots(record(arms=arms, sweep=sweep, runs=runs, summaries=summaries, forgetting=()))
    assert len(pictures) == 3
    # Named beside the lines at nine heights, a line of text apart.
    svg = pictures[0].svg
    heights = sorted(float(y) for y in re.findall(r'class="name"[^>]* y="([\d.]+)"[^>]*>LoRA', svg))
    assert len(heights) == 9
    assert min(b - a for a, b in pairwise(heights)) > 10


def test_differences_in_points_and_in_nats():
    loss = Difference("eval_loss", "lora", "full", 0.01, (-0.01, 0.03), 541, 3, True)
    rows = Page(html_page(record(differences=(loss,)))).rows
    row = next(r for r in rows if r[:1] == ["LoRA, r 8 minus full-parameter"])
    assert row[2:4] == ["+0.0100", "-0.0100 to +0.0300"]


@pytest.mark.parametrize(
    ("value", "shown"), [(1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (0.0003, "3e-4"), (0.03, "0.03"), (1.0, "1")]
)
def test_rates(value, shown):
    assert rate_text(value) == shown


def test_it_is_written_whole_or_named_as_not(tmp_path, text):
    path = tmp_path / "report.html"
    write_html(record(), path)
    assert path.read_text(encoding="utf-8") == text
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(
        OutputError, match=r"taken: could not be saved .*; free space or choose another folder"
    ):
        write_html(record(), tmp_path / "taken")


def test_intervals_wider_than_95_per_cent_are_said_to_be():
    wide = dataclasses.replace(record().differences[0], confidence=1 - 0.05 / 3)
    assert _differences(record(differences=(wide,)), {}).head[3] == "98.3 % interval"
    plain = dataclasses.replace(wide, confidence=0.95)
    assert _differences(record(differences=(plain,)), {}).head[3] == "95 % interval"
