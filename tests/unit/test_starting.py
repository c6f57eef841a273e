"""The search for cycles is off while a command starts, and on again after, whatever happens."""

import gc

import pytest

from tunesmith.starting import search_paused


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    gc.unfreeze()
    gc.enable()


def test_it_is_paused_within_and_what_was_made_is_not_looked_through_later():
    before = gc.get_freeze_count()
    with search_paused():
        assert not gc.isenabled()
        made = [[number] for number in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)


def test_an_inner_pause_leaves_the_end_to_the_outer_one():
    with search_paused():
        with search_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_ends_it_too():
    with pytest.raises(ValueError, match="so"), search_paused():
        raise ValueError("so")
    assert gc.isenabled()
