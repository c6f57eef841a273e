"""All rows of a file as arrays, and the cache of them."""

import gc
import json
from dataclasses import replace as with_fields
from pathlib import Path

import numpy as np
import pytest

from chat_rows import chat
from tiny_tokenizers import FAMILIES
from token_rows import row_of, token_rows
from tunesmith.data.conversation import Conversation, Message
from tunesmith.data.rendering import Renderer, TrainOn
from tunesmith.data.rows import TokenizedRows, tokenize_rows
from tunesmith.data.splits import choose_context_length, load_splits
from tunesmith.errors import ConfigError, DataError

TURNS = TrainOn.ASSISTANT_TURNS
RENDERER = Renderer(FAMILIES[0].build())
OTHER_RENDERER = Renderer(FAMILIES[1].build())


class CountingRenderer(Renderer):
    """Counts the rows it was asked for: none where the cache answers."""

    def __init__(self) -> None:
        super().__init__(RENDERER.tokenizer)
        self.rows = 0

    def batch(self, rows, train_on):
        self.rows += len(rows)
        return super().batch(rows, train_on)


def line(user: str, assistant: str) -> str:
    return chat({"role": "user", "content": user}, {"role": "assistant", "content": assistant})


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path) -> str:
    return write(
        tmp_path / "rows.jsonl", line("q", "yes"), "", line("longer question", "no\n"), line("r", "é")
    )


def same(left: TokenizedRows, right: TokenizedRows) -> bool:
    names = ("ids", "trained", "starts", "file_numbers", "line_numbers")
    equal = all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)
    return equal and (left.path, left.files, left.sha256) == (right.path, right.files, right.sha256)


def test_rows_are_those_of_the_renderer_in_file_order(data):
    rows = tokenize_rows(data, RENDERER, TURNS, cache_dir=None)
    turns = [("q", "yes"), ("longer question", "no\n"), ("r", "é")]
    assert len(rows) == 3
    for i, (user, assistant) in enumerate(turns):
        expected = RENDERER.example(
            Conversation((Message("user", user), Message("assistant", assistant))), TURNS
        )
        assert rows.row(i).ids.tolist() == expected.ids.tolist()
        assert rows.row(i).trained.tolist() == expected.trained.tolist()
        assert rows.lengths[i] == len(expected.ids)
        assert rows.trained_counts[i] == expected.trained.sum()
    assert [rows.origin(i) for i in range(3)] == [f"{data}:1", f"{data}:3", f"{data}:4"]  # line 2 is blank


def test_origins_in_several_files(tmp_path):
    write(tmp_path / "a.jsonl", line("q", "a"))
    write(tmp_path / "b.jsonl", line("q", "b"), line("q", "c"))
    rows = tokenize_rows(str(tmp_path), RENDERER, TURNS, cache_dir=None)
    assert [Path(rows.origin(i)).name for i in range(3)] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]


# --- the cache


def test_a_second_read_comes_from_the_cache(data, tmp_path):
    cache = tmp_path / "cache"
    first = tokenize_rows(data, RENDERER, TURNS, cache_dir=cache)
    counting = CountingRenderer()
    second = tokenize_rows(data, counting, TURNS, cache_dir=cache)
    assert counting.rows == 0
    assert same(first, second)
    assert isinstance(second.ids, np.memmap)
    assert [second.origin(i) for i in range(3)] == [first.origin(i) for i in range(3)]
    skipping = tokenize_rows(data, counting, TURNS, cache_dir=cache, skip_bad_rows=True)
    assert (counting.rows, skipping.skipped) == (0, 0)


def test_nothing_is_kept_without_a_cache_folder(data, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    tokenize_rows(data, RENDERER, TURNS, cache_dir=None)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_changes_tokens_or_origins_misses_the_cache(data, tmp_path):
    cache = tmp_path / "cache"

    def read(path=data, renderer=RENDERER, train_on=TURNS) -> TokenizedRows:
        return tokenize_rows(path, renderer, train_on, cache_dir=cache)

    first = read()
    everything = read(train_on=TrainOn.ALL_TOKENS)
    assert everything.trained.sum() == len(everything.ids) - 3
    assert not np.array_equal(read(renderer=OTHER_RENDERER).ids, first.ids)
    assert len(list(cache.iterdir())) == 3
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(data).read_bytes())
    assert read(str(copy)).origin(0) == f"{copy}:1"
    Path(data).write_text(line("q", "no") + "\n", encoding="utf-8")
    assert len(read()) == 1


def test_a_file_renamed_in_a_folder_keeps_no_stale_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", line("q", "a"))
    tokenize_rows(str(folder), RENDERER, TURNS, cache_dir=tmp_path / "cache")
    (folder / "a.jsonl").rename(folder / "b.jsonl")
    rows = tokenize_rows(str(folder), RENDERER, TURNS, cache_dir=tmp_path / "cache")
    assert Path(rows.origin(0)).name == "b.jsonl:1"


def replace(path: Path, content: bytes) -> None:
    path.unlink()  # a new file: arrays that are mapped from the old one stay whole
    path.write_bytes(content)


def truncate(path: Path) -> None:
    replace(path, path.read_bytes()[:-1])


def empty(path: Path) -> None:
    replace(path, b"")


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink], ids=["truncated", "empty", "missing"])
@pytest.mark.parametrize("name", ["ids.npy", "trained.npy", "starts.npy", "line_numbers.npy", "files.json"])
def test_a_torn_cache_is_made_anew(data, tmp_path, name, damage):
    cache = tmp_path / "cache"
    first = tokenize_rows(data, RENDERER, TURNS, cache_dir=cache)
    (entry,) = cache.iterdir()
    damage(entry / name)
    counting = CountingRenderer()
    assert same(tokenize_rows(data, counting, TURNS, cache_dir=cache), first)
    assert counting.rows == 3
    assert same(tokenize_rows(data, counting, TURNS, cache_dir=cache), first)
    assert counting.rows == 3  # the repaired cache answers
    assert list(cache.iterdir()) == [entry]  # and nothing is left over


def test_arrays_that_do_not_belong_together_are_not_believed(data, tmp_path):
    cache = tmp_path / "cache"
    first = tokenize_rows(data, RENDERER, TURNS, cache_dir=cache)
    (entry,) = cache.iterdir()
    shorter = first.ids[:-1].copy()
    (entry / "ids.npy").unlink()  # first is mapped from it
    np.save(entry / "ids.npy", shorter)
    assert same(tokenize_rows(data, RENDERER, TURNS, cache_dir=cache), first)


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(data, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    assert len(tokenize_rows(data, RENDERER, TURNS, cache_dir=tmp_path / "cache")) == 3


# --- rows that break a rule


def test_bad_rows_are_refused_or_skipped(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        line("q", "a"),
        '{"messages": []}',
        json.dumps({"messages": json.loads(line("q", "a"))["messages"], "tools": [
            {"type": "function", "function": {"name": "f"}}]}),
        line("r", "b"),
    )  # fmt: skip
    cache = tmp_path / "cache"
    with pytest.raises(DataError) as caught:
        tokenize_rows(path, RENDERER, TURNS, cache_dir=cache)
    message = str(caught.value)
    assert "2 rows break a rule" in message
    assert f"{path}:2: messages is empty" in message
    assert f"{path}:3: the row has tools, but" in message  # the template's rule, not only the row's own
    rows = tokenize_rows(path, RENDERER, TURNS, cache_dir=cache, skip_bad_rows=True)
    assert (len(rows), rows.skipped) == (2, 2)
    assert [rows.origin(i) for i in range(2)] == [f"{path}:1", f"{path}:4"]
    with pytest.raises(DataError):  # skipping once must not hide the bad rows from a later, strict read
        tokenize_rows(path, RENDERER, TURNS, cache_dir=cache)


@pytest.mark.parametrize("has_cache", [True, False])
def test_bad_rows_in_many_batches_are_named_in_order_and_the_others_kept(tmp_path, has_cache):
    good, broken, refused = line("q", "a"), "{", chat({"role": "user", "content": "q", "name": "<|im_end|>"})
    tools = json.dumps({**json.loads(good), "tools": [{"type": "function", "function": {"name": "f"}}]})
    lines = [(broken, tools, refused)[i // 100 % 3] if i % 100 == 7 else good for i in range(1300)]
    path = write(tmp_path / "rows.jsonl", *lines)
    cache = tmp_path / "cache" if has_cache else None
    bad = list(range(8, 1301, 100))
    with pytest.raises(DataError, match=rf"{len(bad)} rows break a rule") as caught:
        tokenize_rows(path, RENDERER, TURNS, cache_dir=cache)
    listed = [text for text in str(caught.value).splitlines() if text.startswith("  ")]
    assert [int(text.split(":")[1]) for text in listed] == bad
    assert "JSON is incomplete" in listed[0]
    assert "does not show tools" in listed[1]
    seen: list[int] = []
    rows = tokenize_rows(path, RENDERER, TURNS, cache_dir=cache, skip_bad_rows=True, on_progress=seen.append)
    assert rows.skipped == len(bad)
    assert rows.line_numbers.tolist() == [number for number in range(1, 1301) if number not in bad]
    alone = tokenize_rows(write(tmp_path / "one.jsonl", good), RENDERER, TURNS, cache_dir=None)
    assert rows.ids.tolist() == alone.ids.tolist() * len(rows)
    assert rows.trained_counts.tolist() == alone.trained_counts.tolist() * len(rows)
    assert seen == [200, 400, 600, 800, 1000, 1200]
    assert not has_cache or list((tmp_path / "cache").iterdir()) == []


def test_reading_leaves_the_garbage_collector_as_it_was(data):
    before = gc.get_freeze_count()
    tokenize_rows(data, RENDERER, TURNS, cache_dir=None)
    assert gc.get_freeze_count() == before == 0
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        tokenize_rows(data, RENDERER, TURNS, cache_dir=None)
        # Still frozen, but for the few objects that have died meanwhile.
        assert gc.get_freeze_count() > frozen / 2
    finally:
        gc.unfreeze()


def test_skipping_every_row_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"messages": []}')
    with pytest.raises(DataError, match="1 row breaks a rule"):
        tokenize_rows(path, RENDERER, TURNS, cache_dir=None, skip_bad_rows=True)


def test_progress_is_reported(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[line("q", "a")] * 450)
    seen: list[int] = []
    tokenize_rows(path, RENDERER, TURNS, cache_dir=None, on_progress=seen.append)
    assert seen == [200, 400]


# --- selecting and splits


def test_select_keeps_rows_in_the_order_asked_and_cuts_them():
    rows = token_rows([row_of(1, 2), row_of(2, 3, 10), row_of(0, 2, 20)])
    some = rows.select([2, 1], np.array([3, 4, 1]))
    assert [some.row(i).ids.tolist() for i in range(2)] == [[20], [10, 11, 12, 13]]
    assert some.row(1).trained.tolist() == [False, False, True, True]
    assert [some.origin(i) for i in range(2)] == ["rows.jsonl:3", "rows.jsonl:2"]
    none = rows.select(np.array([], np.int64), rows.lengths)
    assert (len(none), len(none.ids), none.starts.tolist()) == (0, 0, [0])


def test_rows_without_trained_tokens_count_zero():
    rows = token_rows([row_of(2, 0), row_of(1, 1), row_of(2, 0)])
    assert rows.trained_counts.tolist() == [0, 1, 0]


def test_trained_tokens_are_counted_across_blocks_of_rows():
    shapes = [(1 + i % 3, i % 4) for i in range(2**14 + 5)]
    rows = token_rows([])
    trained = np.array([t for prompt, answer in shapes for t in [False] * prompt + [True] * answer])
    starts = np.concatenate([[0], np.cumsum([sum(shape) for shape in shapes])])
    rows = with_fields(rows, ids=np.zeros(len(trained), np.int32), trained=trained, starts=starts)
    assert rows.trained_counts.tolist() == [answer for _, answer in shapes]


def test_splits_share_task_and_context_length(data, tmp_path):
    valid = write(tmp_path / "valid.jsonl", line("q", "a much longer answer than any other"))
    splits = load_splits(data, valid, RENDERER, "auto", cache_dir=None)
    assert splits.train_on is TURNS
    assert splits.longest == splits.valid.lengths.max() > splits.train.lengths.max()
    fitted = splits.fitted(int(splits.train.lengths.max()), "truncate")
    assert fitted.longest == splits.train.lengths.max()
    alone = load_splits(data, None, RENDERER, "causal_lm", cache_dir=None)
    assert alone.valid is None
    assert alone.train.trained_counts.tolist() == [n - 1 for n in alone.train.lengths]


@pytest.mark.parametrize(
    ("asked", "limit", "longest", "scaling", "chosen"),
    [
        (None, 2048, 300, "none", 300),
        (None, 2048, 5000, "none", 2048),
        (None, None, 5000, "none", 5000),
        (512, 2048, 5000, "none", 512),
        (4096, 2048, 300, "linear", 4096),
        (4096, None, 300, "none", 4096),
    ],
)
def test_context_length(asked, limit, longest, scaling, chosen):
    assert choose_context_length(asked, limit, longest, scaling, "here") == chosen


def test_a_context_beyond_the_model_is_an_error_without_scaling():
    with pytest.raises(ConfigError, match="here: is 4,096, but the model was made for 2,048 tokens"):
        choose_context_length(4096, 2048, 300, "none", "here")
