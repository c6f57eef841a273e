import dataclasses
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from tunesmith.errors import OutputError, UserError
from tunesmith.tracking.events import RunRecord, SampleAnswer, Score
from tunesmith.tracking.jsonl import event_object
from tunesmith.tracking.loss_plot import loss_png, smoothed
from tunesmith.tracking.report import read_record, write_report

PRODUCT_FIELDS = {
    "tag",
    "method",
    "model_id",
    "task",
    "steps",
    "epochs",
    "rows",
    "wall_seconds",
    "seconds_to_first_step",
    "real_tokens",
    "trained_tokens",
    "real_tokens_per_second",
    "trained_tokens_per_second",
    "peak_rss_bytes",
    "predicted_peak_rss_bytes",
    "trainable_parameters",
    "total_parameters",
    "checkpoint_bytes",
    "best_checkpoint",
    "eval_loss",
    "perplexity",
    "before",
    "after",
    "versions",
    "machine",
    "data",
    "status",
}

BLUE, VERMILLION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


@pytest.fixture
def objects(events):
    return [found for event in events if (found := event_object(event))]


def test_report_json_has_the_record_under_its_field_names_and_reads_back_equal(tmp_path, make, objects):
    record = make.record()
    write_report(tmp_path, record, objects)
    data = json.loads((tmp_path / "report.json").read_text())
    assert list(data) == [field.name for field in dataclasses.fields(RunRecord)]
    assert set(data) >= PRODUCT_FIELDS
    assert data["data"]["train"]["sha256"] == "ab" * 32
    assert read_record(tmp_path / "report.json") == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "report.json", "report.md"]


def test_absent_and_infinite_numbers_survive(tmp_path, make):
    record = make.record(
        before=None,
        eval_loss=None,
        perplexity=math.inf,
        after=Score(1, 800.0, math.inf),
        best_checkpoint=None,
    )
    write_report(tmp_path, record, [])
    assert read_record(tmp_path / "report.json") == record


def test_fields_of_a_newer_version_are_ignored(tmp_path, make):
    write_report(tmp_path, make.record(), [])
    path = tmp_path / "report.json"
    data = json.loads(path.read_text())
    data["energy_joules"] = 5
    data["after"]["seconds"] = 1.0
    path.write_text(json.dumps(data))
    assert read_record(path) == make.record()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "report.json: is damaged: not JSON"),
        (lambda text: "[]", "is damaged: the whole file"),
        (lambda text: text.replace('"steps"', '"stops"'), "is damaged: steps: Field required"),
        (lambda text: text.replace('"rows": 50', '"rows": "many"', 1), "is damaged: before.rows: "),
        (lambda text: "\ud800".encode("utf-16", "surrogatepass").decode("latin-1"), "not JSON"),
    ],
)
def test_damage_is_named(tmp_path, make, damage, message):
    write_report(tmp_path, make.record(), [])
    path = tmp_path / "report.json"
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read_record(path)


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(UserError, match=r"report\.json: No such file"):
        read_record(tmp_path / "report.json")


def test_a_failed_write_keeps_the_old_report_and_leaves_no_part(tmp_path, make):
    (tmp_path / "report.json").mkdir()  # cannot be replaced by a file
    (tmp_path / "report.json" / "kept").write_text("old")
    with pytest.raises(OutputError, match=r"report\.json: cannot be written"):
        write_report(tmp_path, make.record(), [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_report_for_people_says_what_was_measured(tmp_path, make, objects):
    write_report(tmp_path, make.record(), objects)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# smollm2-135m-instruct-q4:annab:qwxyz\n")
    assert (
        "LoRA training of smollm2-135m-instruct-q4 on 160 rows finished after 20 steps (2 epochs) "
        "in 0:01:05. "
        "On 50 held-out rows the loss went from 2.0000 to 0.5000 and exact match from 10.0 % to 82.0 %; "
        "their 95 % intervals do not overlap."
    ) in text
    for line in (
        "| exact match | 10.0 % [4.0, 22.0] | 82.0 % [69.0, 90.0] | +72.0 points |",
        "| loss | 2.0000 | 0.5000 | -1.5 (-75 %) |",
        "| Name &#124; of [bold]x[/bold]? | Ada | I do not know.<br>Really. | Ada ✓ |",
        "| 2 + 2 | 4 | - | 5 |",
        "| peak memory | 1.50 GiB (planned: 2.00 GiB) |",
        "| trained parameters | 2,500,000 of 137,000,000 (1.82 %) |",
        "Best checkpoint is stored in: `outputs/lora-20260102-030405/best` (5.0 MiB)",
        f"| train | data/train.jsonl | 160 | {'ab' * 32} |",
        "| torch | 2.13.0 |",
        "| memory | 8.00 GiB |",
        "![Training and evaluation loss over the steps](loss.png)",
    ):
        assert line in text.splitlines()


def test_overlapping_intervals_and_a_failed_run_are_said(tmp_path, make):
    close = Score(50, 0.5, 1.6, "exact_match", 0.2, (0.1, 0.33))
    write_report(tmp_path, make.record(after=close, status="interrupted", steps=1, best_checkpoint=None), [])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "was interrupted after 1 step (" in text
    assert "their 95 % intervals overlap, so this change may be chance." in text
    assert "No checkpoint was saved." in text


def test_text_of_models_cannot_break_the_table_or_become_markup(tmp_path, make):
    nasty = "<script>x</script> *a* [l](http://x) `c` a\\|b\n\n# head \x1b snake_case _it_"
    samples = (SampleAnswer("p", nasty, "", nasty),)
    write_report(tmp_path, make.record(samples=samples), [])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    shown = (
        r"&lt;script&gt;x&lt;/script&gt; \*a\* [l\](http://x) \`c\` a\\&#124;b<br><br>"
        r"# head \\x1b snake_case \_it\_"
    )
    assert f"| p | {shown} | (empty) | {shown} ✓ |" in text.splitlines()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture - np.array(colour)).max(axis=2) < 24


def test_the_picture_is_small_and_shows_both_losses(objects):
    png = loss_png(objects, "a $tag$ (lora)")
    picture = pixels(png)
    assert picture.shape == (660, 1100, 3)
    assert near(picture, BLUE).sum() > 300
    assert near(picture, VERMILLION).sum() > 300
    # No evaluation, no colour of evaluation.
    without = pixels(loss_png([event for event in objects if event["event"] != "eval"], "t"))
    assert near(without, VERMILLION).sum() == 0


def test_a_long_noisy_run_stays_under_150_kb(make):
    noise = np.random.default_rng(0).normal(1.0, 0.2, 20000)
    events = [event_object(make.step(step, float(loss))) for step, loss in enumerate(noise, start=1)]
    assert len(loss_png(events, "t")) < 150_000


def test_a_run_without_steps_has_a_picture_too():
    picture = pixels(loss_png([], "nothing"))
    assert (picture.sum(axis=2) < 200).any()  # says so in words
    assert near(picture, BLUE).sum() == 0


def test_of_a_repeated_step_the_last_value_counts(make):
    first, abandoned, repeated = (event_object(make.step(*point)) for point in ((1, 2.0), (2, 9.0), (2, 1.5)))
    assert loss_png([first, abandoned, repeated], "t") == loss_png([first, repeated], "t")
    assert loss_png([first, abandoned], "t") != loss_png([first, repeated], "t")


def test_losses_that_are_not_finite_leave_the_others_readable(make):
    losses = [2.0, math.nan, 1.9, 1.8, math.inf, 1.0, 0.9]
    events = [event_object(make.step(step, loss)) for step, loss in enumerate(losses, start=1)]
    assert near(pixels(loss_png(events, "t")), BLUE).sum() > 300


def test_smoothing_follows_the_bias_corrected_average():
    # Up to 100 points the span is 5, so a step keeps 2/3: 1, (2/3*1 + 4)/(2/3 + 1), ...
    assert smoothed([(1, 1.0), (2, 4.0)]) == [
        (1, pytest.approx(1.0)),
        (2, pytest.approx((2 / 3 + 4) / (5 / 3))),
    ]
    assert [value for _, value in smoothed([(step, 3.0) for step in range(50)])] == pytest.approx([3.0] * 50)
    assert [step for step, _ in smoothed([(1, 1.0), (2, math.nan), (3, 1.0)])] == [1, 3]
