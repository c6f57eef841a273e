"""What a run hands on at its end: the report files, and the copy that a server finds."""

import os

from rich.console import Console
from rich.text import Text

from tunesmith.checkpoints.store import BEST, forward
from tunesmith.run_record import Run
from tunesmith.tracking.events import RunRecord
from tunesmith.tracking.jsonl import read_events
from tunesmith.tracking.report import write_report

_STORAGE_VARIABLES = ("TUNESMITH_STORAGE", "ANYSCALE_ARTIFACT_STORAGE")


def leave_report(run: Run, record: RunRecord) -> None:
    """``report.json``, ``report.md`` and ``loss.png`` in the run's folder."""
    write_report(run.folder, record, read_events(run.folder / "metrics.jsonl"))


def forward_best(run: Run, record: RunRecord, console: Console) -> None:
    """Copy a LoRA run's best checkpoint to ``{storage}/lora_fine_tuning/{tag}``, and say how to go on."""
    if record.method == "lora":
        settings = run.config.output.forward_checkpoint_config
        tag = settings.tag or run.tag
        storage = settings.remote_uri or _storage(run.config.output.output_dir)
        path = forward(run.folder / BEST, storage, tag)
        note = f"Note: LoRA weights will also be stored in path {path} under {tag} bucket."
        console.print(Text(note), soft_wrap=True)
    console.print(Text(f"Report: {run.folder / 'report.md'}"), soft_wrap=True)
    console.print(Text(f"Chat with it: tunesmith chat {run.tag}"), style="bold", soft_wrap=True)


def _storage(output_dir: str) -> str:
    return next((os.environ[name] for name in _STORAGE_VARIABLES if os.environ.get(name)), output_dir)
