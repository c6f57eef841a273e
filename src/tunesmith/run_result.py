"""What a run hands on at its end: the report files, and the copy that a server finds."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tunesmith.checkpoints.store import BEST, forward
from tunesmith.errors import CheckpointError, TunesmithError
from tunesmith.forwarding import forward_storage
from tunesmith.run_record import Run
from tunesmith.tracking.events import RunRecord
from tunesmith.tracking.jsonl import read_events
from tunesmith.tracking.report import write_report


def leave_report(run: Run, record: RunRecord) -> None:
    """``report.json``, ``report.md`` and ``loss.png`` in the run's folder."""
    write_report(run.folder, record, read_events(run.folder / "metrics.jsonl"))


def forward_best(run: Run) -> str | None:
    """Copy a LoRA run's best checkpoint to ``{storage}/lora_fine_tuning/{tag}``; what to say of it.

    Raises:
        CheckpointError: the copy could not be made; all else is done.
    """
    if run.parts.kind != "lora":
        return None
    tag = run.config.output.forward_checkpoint_config.tag or run.tag
    try:
        path = forward(run.folder / BEST, forward_storage(run.config.output), tag)
    except TunesmithError as error:
        go_on = command_line("finetune", "--resume", str(run.folder))
        kept = f"{error.remedy}; then copy {run.folder / BEST}, which is complete, with: {go_on}"
        raise CheckpointError(error.place, error.fault, kept) from error
    return f"Note: LoRA weights will also be stored in path {path} under {tag} bucket."


def print_ways_on(run: Run, console: Console) -> None:
    """Where the report is, and how to talk to the model."""
    console.print(Text(f"Report: {run.folder / 'report.md'}"), soft_wrap=True)
    chat = _chat_command(run.tag, run.config.output.output_dir)
    console.print(Text(f"Chat with it: {chat}"), style="bold", soft_wrap=True)


def _chat_command(tag: str, output_dir: str) -> str:
    where = [] if Path(output_dir) == Path("outputs") else ["--output-dir", output_dir]
    return command_line("chat", tag, *where)


def command_line(*arguments: str) -> str:
    """A line that works when pasted: where the command is not on the path, it is named by its place."""
    beside = Path(sys.executable).with_name("tunesmith")
    command = "tunesmith" if shutil.which("tunesmith") else os.path.relpath(beside)
    return shlex.join([command, *arguments])
