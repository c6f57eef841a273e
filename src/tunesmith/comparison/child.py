"""One training of a comparison, in a process of its own: its peak memory is the run's, and all of it is given back.

``python -m tunesmith.comparison.child FOLDER``: fine-tunes as ``FOLDER/order.json`` says, or goes on where an earlier
process left off. Standard input is a pipe that nobody writes to: when it ends, the comparison is gone, and the run
saves its last step and stops, as on Ctrl-C.
"""

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from tunesmith.checkpoints.atomic import write_json
from tunesmith.checkpoints.lock import locked
from tunesmith.config.load import load_config
from tunesmith.errors import Interrupted, NonFiniteError, TunesmithError

ORDER, FAULT = "order.json", "fault.json"


@dataclass(frozen=True)
class Order:
    """What the child is to do; the settings stand in ``settings.yaml`` beside it."""

    skip_bad_rows: bool
    keeps_rows: bool  # final runs
    score_base: bool


@dataclass(frozen=True)
class Fault:
    """Why a run failed. ``is_final``: training it again would end the same way."""

    message: str
    is_final: bool


def write_order(folder: Path, order: Order) -> None:
    """Leave ``order`` in ``folder``."""
    write_json(folder / ORDER, order)


def read_fault(folder: Path) -> Fault | None:
    """Why the last try in ``folder`` failed, if it did."""
    try:
        return Fault(**json.loads((folder / FAULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def carry_out(folder: Path) -> int:
    """Train; the exit code."""
    order = Order(**json.loads((folder / ORDER).read_text(encoding="utf-8")))
    (folder / FAULT).unlink(missing_ok=True)
    try:
        with locked(folder):
            from tunesmith.run import Compared, finetune

            finetune(
                load_config(str(folder / "settings.yaml"), settled=True),
                Console(width=120, highlight=False),
                skip_bad_rows=order.skip_bad_rows,
                resume="auto",
                compared=Compared(order.score_base) if order.keeps_rows else None,
            )
    except Interrupted as error:
        return error.exit_code
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except TunesmithError as error:
        write_json(folder / FAULT, asdict(Fault(str(error), isinstance(error, NonFiniteError))))
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def stop_when_alone() -> None:
    """Interrupt this process once standard input ends."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    stop_when_alone()
    sys.exit(carry_out(Path(sys.argv[1])))
