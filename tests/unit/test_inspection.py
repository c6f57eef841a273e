"""Which rows were in a step: the order is a function of seed, epoch and rows, and of nothing else."""

import hashlib
import io
import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import tiny_models
from token_rows import row_of, token_rows
from tunesmith.data.order import step_rows
from tunesmith.errors import UserError
from tunesmith.inspection import inspect_step, print_step
from tunesmith.models.batches import micro_batches

ROWS = 20
SEED = 7


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder without a checkpoint: 20 rows, 3 a step, 2 epochs of 7 steps."""
    monkeypatch.chdir(tmp_path)
    base = tiny_models.save_tiny_model(tmp_path / "tiny")
    data = tiny_models.write_rows(tmp_path / "train.jsonl", ROWS)
    folder = tmp_path / "outputs" / "one"
    folder.mkdir(parents=True)
    config = {
        "model_id": str(base),
        "train_path": str(data),
        "num_epochs": 2,
        "train_batch_size_per_device": 3,
        "seed": SEED,
        "lora_config": {},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    facts = {"train": {"path": str(data), "sha256": sha256, "rows": ROWS}}
    (folder / "report.json").write_text(json.dumps({"tag": "mine", "status": "failed", "data": facts}))
    return folder


def record(folder, step, **changes):
    """One line of metrics.jsonl, with what the real rows of ``step`` would count."""
    chosen = rows_by_hand(step)
    counts = [token_counts(row) for row in chosen]
    event = {
        "event": "step",
        "step": step,
        "train_loss_batch": 1.25,
        "real_tokens": sum(tokens for tokens, _ in counts),
        "trained_tokens": sum(trained for _, trained in counts),
    }
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(event | changes) + "\n")


def rows_by_hand(step):
    """Rows of a step, from 0: sorted by BLAKE2b of seed/epoch/row, three at a time, seven steps an epoch."""
    epoch, place = (step - 1) // 7 + 1, (step - 1) % 7
    order = sorted(
        range(ROWS),
        key=lambda row: hashlib.blake2b(b"%d/%d/%d" % (SEED, epoch, row), digest_size=16).digest(),
    )
    return order[3 * place : 3 * place + 3]


def token_counts(row):
    """Tokens of a row, and of its answer with the token that ends it, from the tokenizer alone."""
    tokenizer = tiny_models.chatml_tokenizer()
    colour = tiny_models.COLOURS[row % len(tiny_models.COLOURS)]
    question = f"<|im_start|>user\nitem {row} colour {colour}<|im_end|>\n<|im_start|>assistant\n"
    answer = f"colour is {colour}<|im_end|>"
    whole = tokenizer(f"{question}{answer}\n", add_special_tokens=False)["input_ids"]
    return len(whole), len(tokenizer(answer, add_special_tokens=False)["input_ids"])


def look(run, step, reference=None):
    return inspect_step(reference or str(run), step, [run.parent], lambda _: None)


@pytest.mark.parametrize("step", [1, 6, 7, 8, 14])
def test_rows_of_a_step(run, step):
    record(run, step)
    view = look(run, step)
    chosen = rows_by_hand(step)
    assert [row.row for row in view.rows] == [row + 1 for row in chosen]
    assert [row.place for row in view.rows] == [
        f"{run.parents[1] / 'train.jsonl'}:{row + 1}" for row in chosen
    ]
    assert [(row.tokens, row.trained_tokens) for row in view.rows] == list(map(token_counts, chosen))
    for row, item in zip(view.rows, chosen, strict=True):
        assert row.text.startswith(f"…{item} colour {tiny_models.COLOURS[item % 5]}<|im_end|>")
    assert (view.step, view.total_steps, view.epoch) == (step, 14, 1 if step <= 7 else 2)
    assert (view.rows_in_epoch, view.loss, view.notices) == (ROWS, 1.25, ())


def test_the_last_step_of_an_epoch_holds_what_is_left(run):
    assert [len(look(run, step).rows) for step in (6, 7, 8)] == [3, 2, 3]


def test_the_steps_of_an_epoch_are_each_row_once(run):
    for first in (1, 8):
        seen = [row.row for step in range(first, first + 7) for row in look(run, step).rows]
        assert sorted(seen) == list(range(1, ROWS + 1))


@pytest.mark.parametrize("reference", ["one", "mine"])
def test_a_run_by_name_or_tag(run, reference):
    assert look(run, 3, reference) == look(run, 3)


@pytest.mark.parametrize("step", [0, -1, 15])
def test_a_step_out_of_range_is_refused_with_the_range(run, step):
    with pytest.raises(UserError) as caught:
        look(run, step)
    assert str(caught.value) == f"--step {step}: this run has steps 1 to 14; name one of them"


def test_a_name_is_looked_for_in_every_output_folder(run, tmp_path):
    assert inspect_step("one", 3, [tmp_path / "other", run.parent], lambda _: None) == look(run, 3)


def test_there_is_no_such_run(run):
    with pytest.raises(UserError, match="other: no run folder, here or in"):
        look(run, 1, "other")


@pytest.mark.parametrize("reference", ["~nobody-here/x", "x" * 5000, "a\0b"])
def test_what_can_be_no_run_is_told_in_one_line(run, reference):
    with pytest.raises(UserError) as caught:
        look(run, 1, reference)
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith("; see: tunesmith models")
    assert len(str(caught.value)) < 300


def test_two_runs_of_one_tag_are_refused_by_folder(run):
    twin = run.parent / "two"
    twin.mkdir()
    for name in ("config.yaml", "report.json"):
        (twin / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UserError, match="mine: means 2 runs: ") as caught:
        look(run, 1, "mine")
    assert str(run) in str(caught.value)
    assert str(twin) in str(caught.value)


def test_without_its_data_the_rows_are_known_by_number(run):
    data = run.parents[1] / "train.jsonl"
    data.unlink()
    view = look(run, 9)
    assert [row.row for row in view.rows] == [row + 1 for row in rows_by_hand(9)]
    assert {(row.place, row.tokens, row.trained_tokens, row.text) for row in view.rows} == {(None,) * 4}
    assert view.notices[0].startswith(f"rows are given by number alone: {data}: ")


def test_changed_data_is_not_taken_for_what_was_trained_on(run):
    data = run.parents[1] / "train.jsonl"
    was = hashlib.sha256(data.read_bytes()).hexdigest()
    data.write_text(data.read_text().replace("item 3", "item 4"))
    now = hashlib.sha256(data.read_bytes()).hexdigest()
    view = look(run, 2)
    assert view.rows[0].place is None
    assert view.notices[0] == (
        f"rows are given by number alone: {data}: SHA-256 {was[:12]} when it was trained on, {now[:12]} now"
    )


def test_rows_that_would_be_fewer_now_are_not_taken_either(run):
    file = run / "config.yaml"
    file.write_text(file.read_text() + "context_length: 1\non_too_long: drop\n")
    view = look(run, 2)
    assert view.rows[0].place is None
    assert "no row is left" in view.notices[0]


def test_another_number_of_usable_rows_is_said(run):
    file = run / "report.json"
    file.write_text(file.read_text().replace('"rows": 20', '"rows": 19'))
    view = look(run, 2)
    assert view.rows[0].place is None
    assert view.notices[0].endswith("train.jsonl: 20 usable rows now, 19 were trained on")
    assert view.rows_in_epoch == 19


def test_where_nothing_tells_the_number_of_rows_the_data_does(run):
    record(run, 5)
    (run / "report.json").unlink()
    assert [row.row for row in look(run, 5).rows] == [row + 1 for row in rows_by_hand(5)]
    (run.parents[1] / "train.jsonl").unlink()
    with pytest.raises(UserError, match="does not say how many rows it was trained on"):
        look(run, 5)


def test_a_step_that_was_not_done_is_said(run):
    record(run, 1)
    view = look(run, 2)
    assert view.loss is None
    assert view.notices == (f"{run / 'metrics.jsonl'} has no step 2: so it was not done, or not recorded",)


def test_other_settings_on_the_way_are_said(run):
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | {"forced": ["seed: 7 then, 9 now"]}))
    record(run, 9)
    (notice,) = look(run, 9).notices
    assert "--force-resume let this run go on with other settings (seed: 7 then, 9 now)" in notice
    (run / "report.json").write_text(json.dumps(report | {"forced": []}))
    assert look(run, 9).notices == ()


def test_counts_that_disagree_with_the_record_are_said(run):
    record(run, 4, real_tokens=3, trained_tokens=2)
    (notice,) = look(run, 4).notices
    assert notice.endswith("; the run counted 3 and 2: it may have trained on other rows")


def test_the_last_of_two_records_of_a_step_counts(run):
    record(run, 4, train_loss_batch=9.0)
    record(run, 4, train_loss_batch=0.5)
    assert look(run, 4).loss == 0.5


def test_facts_are_json(run):
    record(run, 1)
    facts = json.loads(json.dumps(look(run, 1).facts()))
    assert (facts["run"], facts["data"]) == ("one", str(run.parents[1] / "train.jsonl"))
    assert set(facts["rows"][0]) == {"row", "place", "tokens", "trained_tokens", "text"}


def test_the_table_for_people(run):
    record(run, 8)
    file = io.StringIO()
    print_step(Console(file=file, width=300, highlight=False), look(run, 8))
    lines = file.getvalue().splitlines()
    assert lines[0] == "Step 8 of 14, epoch 2; loss 1.2500"
    assert lines[1] == f"3 of the 20 rows of {run.parents[1] / 'train.jsonl'}"
    for row in rows_by_hand(8):
        (line,) = [line for line in lines if f"train.jsonl:{row + 1} " in line]
        assert line.split()[1] == str(row + 1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(0, 2**40),
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(1, 60),
    st.booleans(),
)
def test_micro_batches_do_not_change_which_rows_a_step_has(shapes, per_step, seed, epoch, one, other, packs):
    """Rows are told apart by their first token, which no other row has."""
    rows = token_rows([row_of(1, 1 + sum(shape), 100 * n) for n, shape in enumerate(shapes)])
    device = torch.device("cpu")
    steps = step_rows(len(rows), per_step, seed, epoch)
    assert sorted(row for step in steps for row in step) == list(range(len(rows)))
    for chosen in steps:
        for budget in (one, other):
            batches = list(micro_batches(packs, budget, 0, device)(rows, chosen))
            assert sum(batch.rows for batch in batches) == len(chosen)
            assert sorted(first_tokens(batches, packs)) == sorted(100 * row for row in chosen)


def first_tokens(batches, packs):
    for batch in batches:
        ids = batch.input_ids if packs else batch.input_ids[:, 0]
        yield from (int(i) for i in (ids[batch.position_ids == 0] if packs else ids))
