"""What a peer's runner measures, and the job it is given. Imports nothing but the standard library.

A runner is started as ``python run_NAME.py JOB.json``. It reads the job, trains with the peer's own loop, and tells
a ``Meter`` what each micro-batch holds and when each optimizer step has ended. The meter's file is complete after
every step, so a run that is ended at its time limit still shows what it did.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IGNORED = -100  # label of a token that is not trained, in every library used here


@dataclass(frozen=True)
class Job:
    """One training run of one peer.

    Attributes:
        model: folder with config.json, tokenizer and float32 safetensors.
        model_name: what the user calls the model.
        rows: JSON lines with "ids", "labels" (IGNORED where not trained) and "messages", in training order.
        method: "lora" or "full".
        steps, rows_per_step, micro_batch: rows of a step are a multiple of ``micro_batch``.
        learning_rate: constant.
        rank, alpha, dropout, targets: of LoRA.
        result: where the meter writes.
        scratch: an empty folder for whatever the peer leaves.
        cache: a folder that is kept, for a model converted to the peer's own format.
        started: ``time.time()`` when the command was given.
        seed: of adapter and dropout.
    """

    model: str
    model_name: str
    rows: str
    method: str
    steps: int
    rows_per_step: int
    micro_batch: int
    learning_rate: float
    rank: int
    alpha: int
    dropout: float
    targets: Sequence[str]
    result: str
    scratch: str
    cache: str
    started: float
    seed: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.rows_per_step // self.micro_batch

    def read_rows(self) -> list[dict[str, Any]]:
        """All rows, in training order."""
        lines = Path(self.rows).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def read_job() -> Job:
    """The job named on the command line."""
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


class Meter:
    """Tokens, losses and end times of optimizer steps, in a file."""

    def __init__(self, job: Job) -> None:
        self._path = Path(job.result)
        self._started = job.started
        self._record: dict[str, Any] = {"first_step_began": None, "step_ends": [], "losses": []}
        self._record |= {"real_tokens": [], "trained_tokens": []}
        self._real, self._trained = 0, 0
        self._micro_trained = 0
        self._micro_losses: list[tuple[float, int]] = []

    @property
    def has_begun(self) -> bool:
        return self._record["first_step_began"] is not None

    def begin_micro_batch(self, real_tokens: int, trained_tokens: int) -> None:
        """Call before a micro-batch is computed. ``real_tokens`` are the rows' own, without padding."""
        if not self.has_begun:
            self._record["first_step_began"] = time.time() - self._started
        self._real += int(real_tokens)
        self._trained += int(trained_tokens)
        self._micro_trained = int(trained_tokens)

    def micro_batch_loss(self, loss: float) -> None:
        """Mean loss of the micro-batch begun last, for peers that report no loss of a step.

        The step's loss is then the mean over its trained tokens, whatever mean the peer itself follows.
        """
        self._micro_losses.append((loss, self._micro_trained))

    def end_step(self) -> None:
        """Call when the weights have been changed."""
        self._record["step_ends"].append(time.time() - self._started)
        self._record["real_tokens"].append(self._real)
        self._record["trained_tokens"].append(self._trained)
        self._real, self._trained = 0, 0
        if self._micro_losses:
            total = sum(loss * count for loss, count in self._micro_losses)
            self.step_loss(total / sum(count for _, count in self._micro_losses))
            self._micro_losses = []
        self._write()

    def step_loss(self, loss: float) -> None:
        """Loss of the step that has just ended, for peers that report it themselves."""
        self._record["losses"].append(loss)
        self._write()

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._record), encoding="utf-8")
        part.replace(self._path)
