"""The rows of a measurement: the same token ids, labels and steps for every trainer."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.assembly import TRAIN_TOKEN_BUDGET
from tunesmith.data.conversation import detect_task
from tunesmith.data.order import step_rows
from tunesmith.data.packing import pack_rows, split_packed
from tunesmith.data.rendering import Renderer, TrainOn
from tunesmith.data.rows import TokenizedRows, tokenize_rows
from tunesmith.models.base import BaseFolder, load_tokenizer
from tunesmith.models.loss import Batch


@dataclass(frozen=True)
class Prepared:
    """A data set ready to be trained on.

    Attributes:
        name: for people.
        ours: JSONL file for our command.
        tokens: JSON lines for the peers, see ``peers/meter.py``.
        real_tokens, trained_tokens, packed_tokens: of each step; ``packed_tokens`` is what is left to compute
            where a prefix that rows of a micro-batch share is computed once.
    """

    name: str
    ours: Path
    tokens: Path
    real_tokens: tuple[int, ...]
    trained_tokens: tuple[int, ...]
    packed_tokens: tuple[int, ...]


def prepare(
    source: Path, base: BaseFolder, folder: Path, steps: int, rows_per_step: int, seed: int
) -> Prepared:
    """Take the first rows of ``source`` and put them into the order in which our command visits them.

    Within a step, whose result does not depend on it, the peers get the rows by length, so that their padded
    micro-batches hold as little padding as these steps allow.

    Raises:
        SystemExit: there are too few rows.
        DataError: a row breaks a rule.
    """
    path, name = _located(source)
    wanted = steps * rows_per_step
    with path.open(encoding="utf-8") as lines:
        taken = list(itertools.islice((line for line in lines if line.strip()), wanted))
    if len(taken) < wanted:
        raise SystemExit(f"{source}: has {len(taken)} rows, but {steps} steps need {wanted}; lower --steps")
    ours = folder / f"{name}.jsonl"
    ours.write_text("".join(line.rstrip("\n") + "\n" for line in taken), encoding="utf-8")
    renderer = Renderer(load_tokenizer(base))
    rows = tokenize_rows(str(ours), renderer, TrainOn(detect_task(str(ours))), cache_dir=None)
    lengths, trained = rows.lengths, rows.trained_counts
    order = [
        sorted(step, key=lambda i: int(lengths[i]))
        for step in step_rows(wanted, rows_per_step, seed, epoch=1)
    ]
    tokens = folder / f"{name}.tokens.jsonl"
    with tokens.open("w", encoding="utf-8") as file:
        for index in itertools.chain.from_iterable(order):
            file.write(json.dumps(_for_peers(rows, index, json.loads(taken[index]))) + "\n")
    return Prepared(
        name,
        ours,
        tokens,
        tuple(int(lengths[step].sum()) for step in order),
        tuple(int(trained[step].sum()) for step in order),
        tuple(_packed_tokens(rows, step) for step in step_rows(wanted, rows_per_step, seed, epoch=1)),
    )


def _located(source: Path) -> tuple[Path, str]:
    if source.is_dir():
        return source / "train.jsonl", source.resolve().name
    return source, source.resolve().parent.name if source.stem == "train" else source.stem


def _for_peers(rows: TokenizedRows, index: int, record: dict[str, Any]) -> dict[str, Any]:
    row = rows.row(index)
    pairs = zip(row.ids.tolist(), row.trained.tolist(), strict=True)
    ids, labels = zip(*((token, token if trained else -100) for token, trained in pairs), strict=True)
    return {"ids": ids, "labels": labels, "messages": record.get("messages")}


def _packed_tokens(rows: TokenizedRows, step: list[int]) -> int:
    device = torch.device("cpu")
    groups = split_packed(rows, step, TRAIN_TOKEN_BUDGET)
    return sum(computed_tokens(pack_rows([rows.row(i) for i in group], device)) for group in groups)


def computed_tokens(batch: Batch) -> int:
    """Tokens that go through the model for a micro-batch."""
    return int(batch.input_ids.numel())
