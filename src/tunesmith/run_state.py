"""How far a run has come, as its checkpoints keep it in ``training/state.json``."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.assembly import Assembly
from tunesmith.checkpoints.atomic import write_json
from tunesmith.checkpoints.store import TRAINING
from tunesmith.errors import CheckpointError
from tunesmith.native import identity
from tunesmith.run_totals import Totals
from tunesmith.tracking.environment import machine, versions

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_NAME = "state.json"
WORKERS, THREADS, GRADIENTS = "workers", "threads", "gradients"


@dataclass(frozen=True)
class RunState:
    """Saved with a checkpoint.

    Attributes:
        totals: what adds up over the steps, the scores of the base among them.
        answers_before: the base's answers to the held-out questions.
        token_budget: of a micro-batch, where it was planned: another one gives other last bits.
        environment: what else decides the last bits; see ``environment_of``.
    """

    totals: Totals
    answers_before: tuple[str, ...]
    token_budget: int | None
    environment: Mapping[str, str]


def write_state(checkpoint: Path, state: RunState) -> None:
    """Write ``state`` into the folder of a checkpoint."""
    write_json(checkpoint / TRAINING / _NAME, state)


def read_state(checkpoint: Path) -> RunState:
    """The state saved with a checkpoint.

    Raises:
        CheckpointError: there is none, or it is of another version of this program.
    """
    path = checkpoint / TRAINING / _NAME
    try:
        return _adapter().validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            str(checkpoint), "holds no training state", "it can be served, not resumed"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), "cannot be read", "resume with the version that wrote it") from error


@functools.cache
def _adapter() -> "TypeAdapter[RunState]":
    from pydantic import TypeAdapter

    return TypeAdapter(RunState)


def environment_of(parts: Assembly) -> dict[str, str]:
    """What decides the last bits of a result beside configuration, data and weights."""
    packages, host = versions(), machine()
    return {
        **{name: packages[name] for name in ("tunesmith", "torch", "transformers", "peft")},
        "processor": str(host["processor"]),
        THREADS: str(host["torch_threads"]),
        "blas": str(host["blas"]),
        "kernels": identity("training"),
        "gpu": str(host["gpu"]),
        GRADIENTS: parts.passes_reason,
        "tokenizer and chat template": parts.text.renderer.identity[:12],
        "micro-batches": parts.batches_reason,
        WORKERS: str(parts.world),
    }
