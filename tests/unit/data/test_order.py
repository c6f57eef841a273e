"""The order of rows is a pure function of seed and epoch, the same on every machine."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.order import epoch_order, step_rows, stream_seed


def test_the_order_of_a_known_seed():
    """Sorted by BLAKE2b of the text seed/epoch/row, here worked out without the function."""
    keys = {row: hashlib.blake2b(b"42/1/%d" % row, digest_size=16).hexdigest() for row in range(6)}
    assert epoch_order(6, 42, 1) == sorted(keys, key=keys.get)
    # Written down, so that no change of library or code can move it unseen.
    assert epoch_order(6, 42, 1) == [0, 5, 4, 1, 3, 2]


@given(st.integers(0, 200), st.integers(0, 2**63 - 1), st.integers(1, 50))
def test_each_row_is_visited_once(rows, seed, epoch):
    assert sorted(epoch_order(rows, seed, epoch)) == list(range(rows))


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(10) for epoch in range(1, 11)}
    assert len(orders) == 100


def test_first_rows_are_spread_evenly():
    """Each of 5 rows comes first about as often: 1,000 epochs, binomial with a deviation of 12.6."""
    firsts = [epoch_order(5, 1, epoch)[0] for epoch in range(1, 1001)]
    assert all(abs(firsts.count(row) - 200) < 4 * 12.65 for row in range(5))


@given(st.integers(1, 100), st.integers(1, 30), st.integers(0, 5))
def test_steps_cut_the_order_into_equal_parts(rows, rows_per_step, seed):
    steps = step_rows(rows, rows_per_step, seed, 3)
    assert [row for step in steps for row in step] == epoch_order(rows, seed, 3)
    assert all(len(step) == rows_per_step for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= rows_per_step


def test_stream_seeds_depend_on_the_whole_place():
    places = [(1,), (1, 2), (12,), (1, "2", 3), (1, 23), ("dropout", 1), (1, "dropout")]
    seeds = {stream_seed(42, *place) for place in places} | {stream_seed(43, 1)}
    assert len(seeds) == len(places) + 1
    assert all(0 <= seed < 2**63 for seed in seeds)
    digest = hashlib.blake2b(b"42/1/2", digest_size=8).digest()
    assert stream_seed(42, 1, 2) == int.from_bytes(digest, "big") // 2
