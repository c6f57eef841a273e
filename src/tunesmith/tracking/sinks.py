"""Which sinks a run reports to."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from tunesmith.tracking.console import ConsoleSink
from tunesmith.tracking.events import Sink
from tunesmith.tracking.jsonl import JsonlSink
from tunesmith.tracking.wandb_sink import WandbSink, wandb_wanted

Provider = Literal["wandb", "mlflow", "tensorboard"]


def open_sinks(
    run_dir: Path,
    console: Console,
    provider: Provider | None,
    *,
    project: str | None = None,
    run_name: str | None = None,
    tracking_uri: str | None = None,
    experiment_name: str | None = None,
    create_experiment_if_not_exists: bool = True,
    resumed: Mapping[str, str] | None = None,
) -> list[Sink]:
    """Console and ``metrics.jsonl`` always; the named tracker; W&B too where ``WANDB_API_KEY`` is set.

    ``resumed`` holds the ids, by provider, of tracker runs to go on with; see ``tracker_ids``.

    Raises:
        ConfigError: the tracker's package is missing or it cannot be opened.
    """
    sinks: list[Sink] = [ConsoleSink(console), JsonlSink(run_dir / "metrics.jsonl")]
    if wandb_wanted(provider, os.environ):
        sinks.append(
            WandbSink(
                project=project or os.environ.get("WANDB_PROJECT") or "tunesmith",
                run_name=run_name,
                directory=run_dir,
                resumed_id=(resumed or {}).get("wandb"),
            )
        )
    if provider == "mlflow":
        from tunesmith.tracking.mlflow_sink import MlflowSink

        sinks.append(
            MlflowSink(
                tracking_uri=tracking_uri,
                experiment_name=experiment_name or "tunesmith",
                create_experiment_if_not_exists=create_experiment_if_not_exists,
                run_name=run_name,
                resumed_id=(resumed or {}).get("mlflow"),
            )
        )
    if provider == "tensorboard":
        from tunesmith.tracking.tensorboard_sink import TensorBoardSink

        sinks.append(TensorBoardSink(directory=run_dir / "tensorboard"))
    return sinks


def tracker_ids(sinks: Sequence[Sink]) -> dict[str, str]:
    """The ids under which trackers know this run, by provider."""
    named = ((getattr(sink, "provider", None), getattr(sink, "run_id", None)) for sink in sinks)
    return {str(provider): str(run_id) for provider, run_id in named if provider and run_id}
