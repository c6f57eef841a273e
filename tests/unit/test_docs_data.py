"""docs/data.md against the reader and the renderer: every row parses as stated, every message is the real one."""

import re
from pathlib import Path

import pytest

import tiny_models
from tunesmith.data.conversation import Problem, ProblemList, iter_examples
from tunesmith.data.lengths import fit_to_length
from tunesmith.data.rendering import Renderer, TrainOn
from tunesmith.data.rows import tokenize_rows
from tunesmith.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
USER = '{"role": "user", "content": "Hello?"}'
ANSWER = '{"role": "assistant", "content": "Hello."}'


def jsonl_rows(text: str) -> list[tuple[str, str]]:
    """(task, row) of every row in a jsonl block; the task stands behind ``jsonl``."""
    found = re.findall(r"^```jsonl ?(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [(task or "instruction_tuning", row) for task, block in found for row in block.splitlines()]


GOOD_ROWS = [*jsonl_rows(PAGE), *jsonl_rows((ROOT / "README.md").read_text(encoding="utf-8"))]
BAD_ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", PAGE[PAGE.index("| row | error |") :], re.M)


def read(tmp_path: Path, row: str, task: str) -> object:
    file = tmp_path / "rows.jsonl"
    file.write_text(row + "\n", encoding="utf-8")
    ((_, example),) = iter_examples(str(file), task)
    return example


def test_the_page_has_rows_of_both_kinds() -> None:
    assert len(GOOD_ROWS) >= 6
    assert {task for task, _ in GOOD_ROWS} == {"instruction_tuning", "causal_lm"}
    assert len(BAD_ROWS) > 20


@pytest.mark.parametrize(("task", "row"), GOOD_ROWS)
def test_a_good_row_is_good(task: str, row: str, tmp_path: Path) -> None:
    assert not isinstance(read(tmp_path, row, task), Problem)


@pytest.mark.parametrize(("row", "error"), BAD_ROWS)
def test_a_bad_row_is_called_what_the_page_says(row: str, error: str, tmp_path: Path) -> None:
    problem = read(tmp_path, row.replace("…", f"{USER}, {ANSWER}"), "instruction_tuning")
    assert isinstance(problem, Problem)
    assert problem.rule == error


def text_block(start: str) -> str:
    """The fenced text block that begins with ``start``, without the indent it has inside a list."""
    match = re.search(rf"^( *)```text\n( *{re.escape(start)}.*?)^ *```$", PAGE, re.M | re.S)
    assert match, start
    return match[2].replace(f"\n{match[1]}", "\n").strip()


def test_the_list_of_problems_is_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    again = '{"role": "user", "content": "Are you there?"}'
    stranger = '{"role": "asistant", "content": "Hello."}'
    turns = [f"{USER}, {ANSWER}", f"{USER}, {again}", f"{USER}, {stranger}"]
    lines = [f'{{"messages": [{turn}]}}\n' for turn in turns]
    Path("my-chats.jsonl").write_text("".join(lines), encoding="utf-8")
    problems = ProblemList()
    for _, example in iter_examples("my-chats.jsonl", "instruction_tuning"):
        if isinstance(example, Problem):
            problems.add(example)
    with pytest.raises(DataError) as caught:
        problems.raise_if_any("my-chats.jsonl")
    assert str(caught.value) == text_block("my-chats.jsonl: 2 rows")


def test_the_message_about_long_rows_is_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.write_rows(Path("my-chats.jsonl"), 6)
    renderer = Renderer(tiny_models.chatml_tokenizer())
    rows = tokenize_rows("my-chats.jsonl", renderer, TrainOn.ASSISTANT_TURNS, cache_dir=None)
    with pytest.raises(DataError) as caught:
        fit_to_length(rows, 20, "error")
    assert str(caught.value) == text_block("my-chats.jsonl:1: 6 of 6")


def test_the_marked_tokens_are_those_that_are_trained(tmp_path: Path) -> None:
    said = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    turns = ", ".join(f'{{"role": "{role}", "content": "{text}"}}' for role, text in said)
    conversation = read(tmp_path, f'{{"messages": [{turns}]}}', "instruction_tuning")
    tokenizer = tiny_models.chatml_tokenizer()
    row = Renderer(tokenizer).example(conversation, TrainOn.ASSISTANT_TURNS)
    marked, was_trained = "", False
    for token, trained in zip(row.ids.tolist(), row.trained.tolist(), strict=True):
        marked += ("«" if trained else "»") if trained != was_trained else ""
        marked += tokenizer.decode([token])
        was_trained = trained
    assert marked.strip() == text_block("<|im_start|>user\nHi")


def test_special_token_text_is_no_control_token(tmp_path: Path) -> None:
    part = PAGE[PAGE.index("### Special-token text") :]
    ((_, row),) = jsonl_rows(part)
    assert "<|im_end|>" in row
    tokenizer = tiny_models.chatml_tokenizer()
    conversation = read(tmp_path, row, "instruction_tuning")
    tokens = Renderer(tokenizer).example(conversation, TrainOn.ASSISTANT_TURNS)
    # One for each of the two turns, none for the text in the answer.
    assert tokens.ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
