"""Arrays that grow on disk, and what happens where there is no disk to grow on."""

import json
import os
import resource
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

from tunesmith.data.token_store import DTYPES, TokenStore, load_arrays


def batch(first: int, length: int) -> dict[str, np.ndarray]:
    """Different content in each array, all of one length."""
    numbers = np.arange(first, first + length)
    return {name: (numbers * (place + 1)).astype(dtype) for place, (name, dtype) in enumerate(DTYPES.items())}


def grown(store: TokenStore, lengths: list[int]) -> dict[str, np.ndarray]:
    first = 0
    for length in lengths:
        store.append(batch(first, length))
        first += length
    return batch(0, first)


def assert_equal(found, expected):
    assert set(found) == set(DTYPES)
    for name, dtype in DTYPES.items():
        assert found[name].dtype == dtype
        assert found[name].tolist() == expected[name].tolist()


@contextmanager
def files_limited_to(size: int):
    """The system refuses to let a file grow beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("lengths", [[1], [3, 1, 4], [7] * 150], ids=str)
@pytest.mark.parametrize("on_disk", [True, False])
def test_batches_become_whole_arrays(tmp_path, lengths, on_disk):
    with TokenStore(tmp_path if on_disk else None) as store:
        expected = grown(store, lengths)
        found = store.finish(None, ["a.jsonl"])
    assert isinstance(found["ids"], np.memmap) == on_disk
    assert_equal(found, expected)  # also after the folder is gone
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_is_plain_npy_files(tmp_path):
    with TokenStore(tmp_path / "cache") as store:
        expected = grown(store, [5, 6])
        store.finish(tmp_path / "cache" / "key", ["a.jsonl", "b.jsonl"])
    (folder,) = (tmp_path / "cache").iterdir()
    assert_equal({name: np.load(folder / f"{name}.npy") for name in DTYPES}, expected)
    assert json.loads((folder / "files.json").read_text()) == ["a.jsonl", "b.jsonl"]


def test_what_is_kept_is_loaded(tmp_path):
    arrays = batch(0, 3) | {"starts": np.array([0, 1, 3])}
    with TokenStore(tmp_path) as store:
        store.append(arrays)
        store.finish(tmp_path / "key", ["a.jsonl"])
    loaded = load_arrays(tmp_path / "key")
    assert loaded is not None
    assert_equal(loaded[0], arrays)
    assert loaded[1] == ("a.jsonl",)
    assert load_arrays(tmp_path / "other") is None


def test_an_error_on_the_way_leaves_nothing_behind(tmp_path):
    def break_off():
        with TokenStore(tmp_path) as store:
            grown(store, [5])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert list(tmp_path.iterdir()) == []


def test_another_process_that_was_first_is_not_disturbed(tmp_path):
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "files.json").write_text("theirs")
    with TokenStore(tmp_path) as store:
        expected = grown(store, [5])
        found = store.finish(tmp_path / "key", [])
    assert_equal(found, expected)
    assert [path.name for path in tmp_path.rglob("*")] == ["key", "files.json"]


# Headers are 128 bytes, starts has 8 bytes an entry: the first batches fit, a later one fails in its third array.
@pytest.mark.parametrize("limit", [64, 128 + 8 * 25, 128 + 8 * 25 + 3, 4 * 20], ids=str)
def test_a_disk_that_fills_up_costs_no_row(tmp_path, limit):
    with files_limited_to(limit), TokenStore(tmp_path) as store:
        expected = grown(store, [10, 10, 10, 10])
        found = store.finish(tmp_path / "key", [])
    assert not isinstance(found["ids"], np.memmap)
    assert_equal(found, expected)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_nothing_can_be_made(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with TokenStore(tmp_path / "cache") as store:
        expected = grown(store, [10, 10])
        found = store.finish(tmp_path / "cache" / "key", [])
    assert_equal(found, expected)


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    for name, hours in ((".tmp-killed", 25), (".tmp-at-work", 1), ("kept", 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ids.npy").write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    with TokenStore(tmp_path) as store:
        grown(store, [1])
        store.finish(None, [])
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-at-work", "kept"}


def test_memory_stays_flat(tmp_path):
    numbers = batch(0, 100_000)
    size = sum(array.nbytes for array in numbers.values())
    tracemalloc.start()
    try:
        with TokenStore(tmp_path) as store:
            for _ in range(20):
                store.append(numbers)
            store.finish(None, [])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 4  # of 20 times that which was written
