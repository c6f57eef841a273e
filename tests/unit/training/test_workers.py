"""Several workers over gloo against one process: the same losses, the same weights, the same answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tunesmith.errors import CheckpointError
from tunesmith.models.batches import Share
from tunesmith.training.process_group import tells_of_loss
from tunesmith.training.workers import ALONE, first_then_others, on_first
from worker_parts import (
    ROWS,
    Crew,
    Training,
    distance,
    in_turn,
    losses,
    summed,
    talked,
    told_by_first,
    train,
    train_alone,
)

STEPS = 6  # 13 rows in steps of 6, two epochs


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "what",
    [
        Training(lora=True, cut_for=1),
        Training(lora=False, cut_for=1),
        Training(lora=True, cut_for=1, dropout=0.3),
        Training(lora=False, cut_for=1, packs=False),
    ],
    ids=["lora", "full", "lora with dropout", "full, padded"],
)
def test_workers_train_to_what_one_process_trains_to(crew: Crew, world: int, what: Training):
    what = replace(what, cut_for=world)
    alone, together = train_alone(what), crew(world, train, what)
    assert len(alone.losses) == STEPS
    for found in together:
        assert found.losses == pytest.approx(alone.losses, rel=1e-6)
        assert found.norms == pytest.approx(alone.norms, rel=1e-5)
        assert distance(found, alone) < 1e-6
        # What they save and go on with is one and the same, to the bit.
        assert all(np.array_equal(w, found.weights[name]) for name, w in together[0].weights.items())


def test_in_double_precision_nothing_is_left_of_the_difference(crew: Crew):
    what = Training(lora=False, cut_for=4, dtype=torch.float64)
    alone, together = train_alone(what), crew(4, train, what)
    assert together[0].losses == pytest.approx(alone.losses, rel=1e-12)
    assert distance(together[0], alone) < 1e-9


def test_how_many_workers_there_are_changes_no_order_and_no_loss_but_for_rounding(crew: Crew):
    # Without dropout the cut does not matter either.
    found = {world: crew(world, train, Training(lora=True, cut_for=world))[0] for world in (2, 4)}
    one = train_alone(Training(lora=True, cut_for=1))
    for other in found.values():
        assert other.losses == pytest.approx(one.losses, rel=1e-6)


def test_gradients_are_summed_and_none_stays_none_only_where_nobody_has_one(crew: Crew):
    before = [[1.0, None, None], [2.0, 5.0, None], [4.0, None, None]]
    for after in crew(3, summed, before):
        assert after[:3] == [[7.0, 7.0], [5.0, 5.0], None]
        assert after[3] == pytest.approx([3.0 + 3e-12], rel=1e-14)  # float64 was not summed in float32


def test_workers_hear_from_each_other(crew: Crew):
    for found in crew(3, talked):
        assert found == {
            "numbers": (3.0, 3.75),
            "gathered": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "all": True,
            "last": True,
            "none": False,
            "shared": [[0.0, 0.0, 0.0], 5.0],
        }


def test_what_the_first_does_or_fails_to_do_all_are_told(crew: Crew):
    assert crew(3, told_by_first, False) == [("result", ["by 0"]), ("result", []), ("result", [])]
    said = "step 3: cannot be saved; free some space"
    assert crew(2, told_by_first, True) == [(said, ["by 0"]), (said, [])]


def test_the_first_goes_before_the_others(crew: Crew, tmp_path):
    first, *others = crew(3, in_turn, tmp_path)
    assert first == []
    assert all("rank 0" in found for found in others)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_all_have_the_losses_of_all_rows(crew: Crew, world: int, packs: bool):
    alone = losses(ALONE, packs)
    for found in crew(world, losses, packs):
        assert found.mean == pytest.approx(alone.mean, rel=1e-6)
        assert found.sums.tolist() == pytest.approx(alone.sums.tolist(), rel=1e-5)
        assert found.tokens.tolist() == alone.tokens.tolist()


def test_one_process_alone_asks_nobody():
    assert ALONE.gather("x") == ["x"]
    assert ALONE.sum_numbers(0.1, 0.2) == (0.1, 0.2)
    assert [ALONE.agree(flag) for flag in (True, False)] == [True, False]
    assert on_first(ALONE, lambda: None) is None
    assert first_then_others(ALONE, lambda: 3) == 3
    with pytest.raises(CheckpointError, match="step 3"):
        on_first(ALONE, lambda: (_ for _ in ()).throw(CheckpointError("step 3", "is gone")))


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (
            RuntimeError("[/src/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
            True,
        ),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (torch.distributed.DistNetworkError("connection closed"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_worker_lost_within_a_pass_is_told_from_a_fault_of_the_program(error, is_loss):
    assert tells_of_loss(error) is is_loss


def by_budget(costs: list[int]):
    """Cuts rows of these costs, in their order."""

    def split(budget: int) -> list[list[int]]:
        groups: list[list[int]] = [[]]
        for row, cost in enumerate(costs):
            if groups[-1] and sum(costs[i] for i in groups[-1]) + cost > budget:
                groups.append([])
            groups[-1].append(row)
        return groups

    return split


@pytest.mark.parametrize(
    ("costs", "budget", "world", "groups"),
    [
        ([5] * 8, 100, 1, 1),  # one process: as ever
        ([5] * 8, 100, 2, 2),  # one group would leave a worker idle
        ([5] * 8, 15, 2, 4),  # three groups: one worker would have twice the work
        ([5] * 8, 10, 2, 4),  # already even
        ([5] * 3, 100, 4, 3),  # fewer rows than workers
        ([1] * 140, 20, 3, 9),  # seven groups: one worker would have three of twenty rows, the others two
        ([5] * 40, 10, 3, 20),  # forty groups of one row would take as long as twenty of two
        ([1] * 100, 2, 3, 50),  # many turns: one more or less does not matter
    ],
)
def test_a_step_is_cut_so_that_all_workers_have_as_much_to_do(costs, budget, world, groups):
    shares = [Share(rank, world).of(by_budget(costs), len(costs), budget) for rank in range(world)]
    assert sum(map(len, shares)) == groups
    assert sorted(row for share in shares for group in share for row in group) == list(range(len(costs)))
    assert all(sum(costs[row] for row in group) <= budget for share in shares for group in share)


def test_the_rows_of_these_tests_are_uneven():
    assert len(ROWS) % 6 == 1
    assert len(set(ROWS.trained_counts.tolist())) > 6
