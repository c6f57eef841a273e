"""What workers of which each holds a share of every tensor are asked to do in tests."""

from typing import Any

import numpy as np
import torch
import torch._dynamo  # FSDP2 imports it at its first pass
import torch.distributed.fsdp
import torch.distributed.tensor  # here, so that no process of the crew takes seconds for it

from tiny_models import tiny_model
from tunesmith.errors import CheckpointError
from tunesmith.evaluation.answers import Question, greedy_answers
from tunesmith.evaluation.row_loss import RowLosses, row_loss
from tunesmith.models.batches import Share, micro_batches, prepare_packing
from tunesmith.models.method import (
    is_finite,
    prepare_full,
    prepare_lora,
    read_trained,
    save_servable,
    servable_tensors,
)
from tunesmith.models.passes import choose_passes
from tunesmith.training.optim import adamw
from tunesmith.training.process_group import ProcessGroup
from tunesmith.training.sharded_group import ShardedGroup
from tunesmith.training.state import (
    named_trainable,
    read_training_state,
    save_training_state,
    training_tensors,
)
from tunesmith.training.workers import Workers
from worker_parts import CPU, ROWS, Trained, Training, train


class Words:
    """A tokenizer's part in saving and answering."""

    def save_pretrained(self, _folder: Any) -> None:
        pass

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(one)) for one in ids)


def train_sharded(
    workers: ProcessGroup, what: Training, regather: bool | int, offloads: bool = False
) -> Trained:
    """The same with every tensor split over the workers; the weights are the first worker's to tell."""
    return train(ShardedGroup(workers.here, regather, offloads=offloads), what)


def any_model(lora: bool, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = tiny_model(dtype=dtype)
    if lora:
        return prepare_lora(model, {"r": 4}, seed=1, place="lora_config", continue_from=None)
    return prepare_full(model)


def held(workers: ProcessGroup, lora: bool) -> tuple[int, int]:
    """Numbers that this worker holds, of how many."""
    model = any_model(lora)
    every = sum(p.numel() for p in model.parameters())
    ShardedGroup(workers.here, True).shard(model)
    return sum(p.to_local().numel() for p in model.parameters()), every


def losses_sharded(workers: ProcessGroup, packs: bool) -> RowLosses:
    group, model = ShardedGroup(workers.here, True), tiny_model()
    group.shard(model)
    packs = packs and prepare_packing(model, ROWS, 2)[0]
    passes, why = choose_passes(model, ROWS, packs=packs, autocast=None, sharded=True)
    assert why == "autograd: weights are sharded"
    batches = micro_batches(packs, 40, 2, CPU, share=Share(group.rank, group.world, in_step=True))
    return row_loss(passes, ROWS, micro_batches=batches, workers=group)


def answers_sharded(workers: Workers, shards: bool) -> list[str]:
    group = ShardedGroup(workers.here, True) if shards else workers
    model = tiny_model()
    group.shard(model)
    questions = [Question(tuple(range(3, 3 + n)), "", "") for n in (3, 7, 4, 11, 5)]
    return greedy_answers(
        model, Words(), questions, stop_token_ids=(2,), stop_strings=(), max_new_tokens=6, workers=group
    )


def saved_and_read(workers: ProcessGroup, lora: bool, folder: Any) -> dict[str, np.ndarray]:
    """Take a step, save, spoil everything, put it back; what is there then, whole."""
    group, model = ShardedGroup(workers.here, True), any_model(lora)
    kind = "lora" if lora else "full"
    group.shard(model)
    trained = named_trainable(model)
    optimizer = adamw(list(trained.values()), betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 1e-2
    model(input_ids=torch.arange(3, 19)[None] + group.rank).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    kept = trained if lora else {}
    tensors = training_tensors(trained, optimizer, kept)
    served, state = group.whole(servable_tensors(model, kind)), group.whole(tensors)
    if group.rank == 0:
        save_servable(model, kind, Words(), folder, "base", served)
        save_training_state(folder, state)
    with torch.no_grad():
        for tensor in (*trained.values(), *tensors.values()):
            tensor.fill_(3.0)
    assert is_finite(model)
    group.put(trained, lambda: read_trained(model, kind, folder))
    group.put(tensors, lambda: read_training_state(folder, tensors))
    return {name: tensor.numpy() for name, tensor in group.whole({**tensors, **trained}).items()}


def spread(workers: ProcessGroup, lora: bool, folder: Any) -> dict[str, np.ndarray]:
    """Put what two workers saved into another number of them."""
    group, model = ShardedGroup(workers.here, False), any_model(lora)
    group.shard(model)
    trained = named_trainable(model)
    group.put(trained, lambda: read_trained(model, "lora" if lora else "full", folder))
    return {name: tensor.numpy() for name, tensor in group.whole(trained).items()}


def refused(workers: ProcessGroup, folder: Any) -> str:
    group, model = ShardedGroup(workers.here, True), any_model(lora=True)
    group.shard(model)
    try:
        group.put(named_trainable(model), lambda: read_trained(model, "lora", folder))
    except CheckpointError as error:
        return str(error)
    return "taken"


def unequal(workers: ProcessGroup) -> list[bool]:
    """Whether a weight that is not finite is seen, by the worker that holds it and by all."""
    group, model = ShardedGroup(workers.here, True), any_model(lora=False)
    group.shard(model)
    if group.rank == 1:
        with torch.no_grad():
            next(model.parameters()).to_local()[0, 0] = float("nan")
    own = is_finite(model)
    return [own, not group.agree(not own)]
