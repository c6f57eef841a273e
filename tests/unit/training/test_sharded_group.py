"""Workers that hold a share of every tensor against one process: the same losses, the same weights, whole again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sharded_parts import (
    answers_sharded,
    any_model,
    held,
    losses_sharded,
    refused,
    saved_and_read,
    spread,
    train_sharded,
    unequal,
)
from tiny_models import tiny_model
from tunesmith.evaluation.row_loss import row_loss
from tunesmith.models.batches import micro_batches
from tunesmith.models.method import read_trained
from tunesmith.models.passes import AutogradPasses
from tunesmith.training.optim import adamw
from tunesmith.training.state import named_trainable, read_training_state, training_tensors
from tunesmith.training.workers import ALONE
from worker_parts import CPU, ROWS, Crew, Training, distance, train_alone


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("what", "regather"),
    [
        (Training(lora=True, cut_for=1), True),
        (Training(lora=True, cut_for=1), False),
        (Training(lora=False, cut_for=1), True),
        (Training(lora=False, cut_for=1), False),
        (Training(lora=True, cut_for=1, dropout=0.3, kernels=False), True),
        (Training(lora=False, cut_for=1, packs=False), True),
    ],
    ids=["lora 3", "lora 2", "full 3", "full 2", "lora 3 with dropout", "full 3, padded"],
)
def test_split_workers_train_to_what_one_process_trains_to(
    crew: Crew, world: int, what: Training, regather: bool
):
    what = replace(what, cut_for=world)
    alone, together = train_alone(what), crew(world, train_sharded, what, regather)
    for found in together:  # every worker knows the loss and the norm of the whole step
        assert found.losses == pytest.approx(alone.losses, rel=1e-6)
        assert found.norms == pytest.approx(alone.norms, rel=1e-5)
    assert together[0].weights.keys() == alone.weights.keys()
    assert distance(together[0], alone) < 1e-6


@pytest.mark.parametrize("lora", [True, False])
def test_shares_in_the_hosts_memory_train_to_the_same(crew: Crew, lora: bool):
    """On a CPU they lie there anyhow: what is tried is FSDP2's path for it, with gathering, clipping and saving."""
    what = Training(lora=lora, cut_for=2)
    alone, together = train_alone(what), crew(2, train_sharded, what, True, True)
    assert together[0].losses == pytest.approx(alone.losses, rel=1e-6)
    assert distance(together[0], alone) < 1e-6


def test_in_double_precision_nothing_is_left_of_the_difference(crew: Crew):
    what = Training(lora=False, cut_for=4, dtype=torch.float64, kernels=False)
    alone, together = train_alone(what), crew(4, train_sharded, what, 2)  # groups of two, as hpZ has them
    assert together[0].losses == pytest.approx(alone.losses, rel=1e-12)
    assert distance(together[0], alone) < 1e-9


@pytest.mark.parametrize("lora", [True, False])
def test_each_holds_its_share_of_all_tensors_the_frozen_ones_too(crew: Crew, lora: bool):
    found = crew(2, held, lora)
    assert [(own * 2, every) for own, every in found] == [(found[0][1], found[0][1])] * 2


@pytest.mark.parametrize("packs", [True, False])
def test_split_workers_have_the_losses_of_all_rows(crew: Crew, packs: bool):
    model = tiny_model()
    alone = row_loss(AutogradPasses(model), ROWS, micro_batches=micro_batches(False, 40, 2, CPU))
    for found in crew(4, losses_sharded, packs):
        assert found.mean == pytest.approx(alone.mean, rel=1e-6)
        assert found.sums.tolist() == pytest.approx(alone.sums.tolist(), rel=1e-5)


def test_split_workers_answer_what_one_process_answers(crew: Crew):
    alone = answers_sharded(ALONE, shards=False)
    assert len(set(alone)) > 1
    assert crew(2, answers_sharded, True) == [alone, alone]
    assert crew(2, answers_sharded, False) == [alone, alone]


@pytest.mark.parametrize("lora", [True, False])
def test_what_split_workers_save_is_the_file_of_one_process_and_goes_on_in_any_number(
    crew: Crew, lora: bool, tmp_path
):
    found, nothing = crew(2, saved_and_read, lora, tmp_path)
    assert nothing == {}
    model = any_model(lora)
    kind = "lora" if lora else "full"
    trained = named_trainable(model)
    whole = read_trained(model, kind, tmp_path)
    assert whole.keys() == trained.keys()
    moved = sum(float((whole[name] - tensor.detach()).abs().sum()) for name, tensor in trained.items())
    assert moved > 0.1  # of the step
    for name, tensor in whole.items():
        assert np.array_equal(found[name], tensor.numpy()), name
    optimizer = adamw(list(trained.values()), betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1)
    tensors = training_tensors(trained, optimizer, trained if lora else {})
    for name, tensor in read_training_state(tmp_path, tensors).items():
        assert np.array_equal(found[name], tensor.numpy()), name
    for name, tensor in crew(4, spread, lora, tmp_path)[0].items():
        assert np.array_equal(found[name], tensor), name


def test_a_checkpoint_that_cannot_be_read_is_told_to_all(crew: Crew, tmp_path):
    first, second = crew(2, refused, tmp_path)
    assert first == second
    assert first.startswith(f"{tmp_path}: cannot be read")


def test_a_number_that_is_not_finite_is_found_in_any_share(crew: Crew):
    assert crew(2, unequal) == [[True, False], [False, False]]
