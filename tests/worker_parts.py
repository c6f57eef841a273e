"""Real processes that train together over gloo, kept for the whole session, and what they are asked to do in tests."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiny_models import tiny_model
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import CheckpointError
from tunesmith.evaluation.row_loss import RowLosses, row_loss
from tunesmith.models.batches import MicroBatches, Share, micro_batches, prepare_packing
from tunesmith.models.loss import Batch
from tunesmith.models.method import prepare_full, prepare_lora
from tunesmith.models.passes import choose_passes
from tunesmith.tracking.events import StepEvent
from tunesmith.training.loop import train_steps
from tunesmith.training.optim import adamw
from tunesmith.training.process_group import ProcessGroup, process_group
from tunesmith.training.schedule import plan_steps
from tunesmith.training.state import named_trainable
from tunesmith.training.workers import ALONE, Workers, first_then_others, on_first

CPU = torch.device("cpu")


class Crew:
    """Processes that carry out a function as the workers of one group."""

    def __init__(self, most: int, folder: Path) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["sharded_parts"])  # the libraries are imported once, not in each
        self._pool = ProcessPoolExecutor(most, mp_context=context)
        self._folder, self._meetings = folder, 0

    def __call__(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(workers, *arguments)`` on each; the results by rank."""
        self._meetings += 1
        address = f"file://{self._folder / str(self._meetings)}"
        # Each is busy until all have come, so no process gets two of them.
        asked = [
            self._pool.submit(_in_group, rank, world, address, function, arguments) for rank in range(world)
        ]
        return [answer.result(timeout=400) for answer in asked]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _in_group(
    rank: int, world: int, address: str, function: Callable[..., Any], arguments: Sequence[Any]
) -> Any:
    torch.set_num_threads(1)
    with process_group(rank, world, address) as workers:
        return function(workers, *arguments)


def make_rows(lengths: list[int], trained_from: list[int]) -> TokenizedRows:
    """Rows of random tokens; of each those from ``trained_from`` on are trained."""
    generator = np.random.default_rng(3)
    ids = np.concatenate([generator.integers(3, 400, n).astype(np.int32) for n in lengths])
    masks = [np.arange(n) >= start for n, start in zip(lengths, trained_from, strict=True)]
    return TokenizedRows(
        "rows.jsonl", "0" * 64, ids, np.concatenate(masks), np.concatenate([[0], np.cumsum(lengths)]), ("rows.jsonl",),
        np.zeros(len(lengths), np.int32), np.arange(1, len(lengths) + 1, dtype=np.int32),
    )  # fmt: skip


# 13 rows in steps of 6: the last step has one, so that with four workers three have nothing to do.
ROWS = make_rows([26, 5, 9, 14, 3, 20, 7, 31, 12, 4, 18, 9, 22], [1, 4, 8, 2, 2, 19, 3, 5, 11, 1, 2, 7, 20])


@dataclass(frozen=True)
class Training:
    """What is trained: ``cut_for`` is the number of workers for whom a step is cut."""

    lora: bool
    cut_for: int
    packs: bool = True
    dropout: float = 0.0
    token_budget: int = 40
    dtype: torch.dtype = torch.float32
    epochs: int = 2
    kernels: bool = (
        True  # they draw dropout in another order than autograd, and its norms are float32 at most
    )


@dataclass(frozen=True)
class Trained:
    """What came of it: each step's loss and gradient norm, the trained tensors at the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]


def distance(one: Trained, other: Trained) -> float:
    """Of all weights together, relative."""
    a, b = (
        np.concatenate([w.ravel() for w in found.weights.values()]).astype(np.float64)
        for found in (one, other)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def train(workers: Workers, what: Training) -> Trained:
    """Train a tiny model, as one of ``workers``."""
    model: Any = tiny_model(dtype=what.dtype)
    if what.lora:
        settings = {"r": 4, "lora_alpha": 8, "lora_dropout": what.dropout}
        model = prepare_lora(model, settings, seed=1, place="lora_config", continue_from=None)
    else:
        model = prepare_full(model)
    workers.shard(model)
    packs = what.packs and prepare_packing(model, ROWS, 2)[0]
    passes, _ = choose_passes(
        model, ROWS, packs=packs, autocast=None, sharded=workers.in_step or not what.kernels
    )
    trained = named_trainable(model)
    optimizer = adamw(list(trained.values()), betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1)
    events: list[StepEvent] = list(
        train_steps(
            passes,
            list(trained.values()),
            ROWS,
            plan_steps(len(ROWS), 6, what.epochs, 1),
            optimizer,
            learning_rate_at=lambda step: 1e-3 / step,
            max_grad_norm=0.5,
            micro_batches=_batches(workers, what, packs),
            seed=7,
            started=time.perf_counter(),
            workers=workers,
        )
    )
    return Trained(
        [event.train_loss_batch for event in events],
        [event.grad_norm for event in events],
        {name: tensor.detach().numpy().copy() for name, tensor in workers.whole(trained).items()},
    )


def _batches(workers: Workers, what: Training, packs: bool) -> MicroBatches:
    if workers.world > 1:
        share = Share(workers.rank, workers.world, workers.in_step)
        return micro_batches(packs, what.token_budget, 2, CPU, share=share)
    shares = [
        micro_batches(packs, what.token_budget, 2, CPU, share=Share(rank, what.cut_for))
        for rank in range(what.cut_for)
    ]

    def all_of_them(rows: TokenizedRows, chosen: Sequence[int]) -> Iterator[Batch]:
        for turn in zip_longest(*(share(rows, chosen) for share in shares)):
            yield from (batch for batch in turn if batch is not None)

    return all_of_them


def train_alone(what: Training) -> Trained:
    return train(ALONE, what)


def losses(workers: Workers, packs: bool) -> RowLosses:
    """Losses of the rows by a tiny model."""
    model = tiny_model()
    packs = packs and prepare_packing(model, ROWS, 2)[0]
    passes, _ = choose_passes(model, ROWS, packs=packs, autocast=None)
    batches = micro_batches(packs, 40, 2, CPU, share=Share(workers.rank, workers.world))
    return row_loss(passes, ROWS, micro_batches=batches, workers=workers)


def summed(workers: ProcessGroup, gradients: list[list[float | None]]) -> list[list[float] | None]:
    """The gradients after summing; ``gradients[rank]`` are those before, one number a parameter, None where none."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in gradients[0]]
    # One of another type in between: it is summed apart.
    parameters.append(torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    for parameter, value in zip(parameters, gradients[workers.rank], strict=False):
        parameter.grad = None if value is None else torch.full((2,), value)
    parameters[-1].grad = torch.tensor([1e-12], dtype=torch.float64) + workers.rank
    workers.sum_gradients(parameters)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def talked(workers: ProcessGroup) -> dict[str, Any]:
    """What each of the small calls gives."""
    shared = [torch.full((3,), float(workers.rank)), torch.tensor(float(workers.rank + 5))]
    workers.share(shared)
    workers.barrier()
    return {
        "numbers": workers.sum_numbers(1.0, workers.rank + 0.25),
        "gathered": workers.gather({"rank": workers.rank}),
        "all": workers.agree(True),
        "last": workers.agree(workers.rank == workers.world - 1),
        "none": workers.agree(False),
        "shared": [tensor.tolist() for tensor in shared],
    }


def told_by_first(workers: ProcessGroup, fails: bool) -> tuple[str, list[str]]:
    """What every worker hears of something that only the first one does, and who did it."""
    done: list[str] = []

    def act() -> str:
        done.append(f"by {workers.rank}")
        if fails:
            raise CheckpointError("step 3", "cannot be saved", "free some space")
        return "result"

    try:
        said = on_first(workers, act)
    except CheckpointError as error:
        said = str(error)
    return said, done


def in_turn(workers: ProcessGroup, folder: Path) -> list[str]:
    """What lay in the folder when it was this worker's turn; each leaves a file."""

    def act() -> list[str]:
        found = sorted(path.name for path in folder.iterdir())
        (folder / f"rank {workers.rank}").touch()
        return found

    return first_then_others(workers, act)
