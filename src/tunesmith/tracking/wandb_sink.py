"""Events to Weights & Biases."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.tracking.events import Event, RunFinished, RunStarted
from tunesmith.tracking.jsonl import plain
from tunesmith.tracking.scalars import scalars
from tunesmith.tracking.trouble import Trouble

_FINISH_SECONDS = 120.0  # how long the end of a run waits for uploads; what is left stays on disk


def wandb_wanted(provider: str | None, environ: Mapping[str, str]) -> bool:
    """True where the config names W&B, or a non-empty ``WANDB_API_KEY`` is in ``environ``."""
    return provider == "wandb" or bool(environ.get("WANDB_API_KEY", "").strip())


class WandbSink:
    """Logs to one W&B run, which W&B keeps under ``directory``/wandb.

    The key is found by wandb itself (environment or netrc); it never passes through here.
    ``WANDB_MODE`` (online, offline, disabled) and wandb's other variables are respected.

    Args:
        project: W&B project; None leaves the choice to wandb (``WANDB_PROJECT``).
        run_name: name shown for the run; None takes the run's own name.
        directory: folder for W&B's local files; must be writable.
        resumed_id: the W&B run to go on with; None: a new one.

    Raises:
        ConfigError: wandb is not installed, or the run cannot be opened (no key, no network).
    """

    provider = "wandb"

    def __init__(
        self, *, project: str | None, run_name: str | None, directory: Path, resumed_id: str | None = None
    ) -> None:
        # Reports of wandb's own crashes to its maker: not unless the user has asked for them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError as error:
            remedy = "run: pip install 'tunesmith[wandb]', or unset WANDB_API_KEY"
            raise ConfigError("logger.provider", "wandb is not installed", remedy) from error
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._run: Any = wandb.init(
                project=project,
                name=run_name,
                dir=str(directory),
                settings=_settings(wandb),
                id=resumed_id,
                resume="allow" if resumed_id else None,
            )
        except Exception as error:  # wandb raises many kinds, none with a common base
            remedy = "check WANDB_API_KEY and the network, or set WANDB_MODE=offline"
            raise ConfigError("logger (W&B)", _first_line(error), remedy) from error
        self.run_id = str(self._run.id)
        self._trouble = Trouble("W&B")
        self._named = run_name is not None
        self._exit_code = 1  # until the run says that it finished
        self._closed = False

    @property
    def url(self) -> str | None:
        """Where the run can be seen; None when offline."""
        url = getattr(self._run, "url", None)
        return str(url) if url else None

    def emit(self, event: Event) -> None:
        if self._closed:
            return
        with self._trouble.caught():
            if isinstance(event, RunStarted):
                self._run.config.update(plain(event.config), allow_val_change=True)
                if not self._named:
                    self._run.name = event.run
            elif isinstance(event, RunFinished):
                self._exit_code = 0 if event.record.status == "finished" else 1
                self._run.summary["status"] = event.record.status
            points = scalars(event)
            if points:
                self._run.log({point.name: point.value for point in points}, step=points[0].step)

    def close(self) -> None:
        """Finish the run, as failed unless it reported that it finished. Waits for uploads."""
        if self._closed:
            return
        self._closed = True
        with self._trouble.caught():
            self._run.finish(exit_code=self._exit_code)


def _settings(wandb: Any) -> Any:
    wanted = {
        "console": "off",  # what we print is not wandb's to keep, and it would break the live display
        "silent": True,  # start and end are ours to tell; ``url`` says where the run is
        "save_code": False,
        "finish_timeout": _FINISH_SECONDS,
        "finish_timeout_raises": True,
    }
    known = getattr(wandb.Settings, "model_fields", {})
    # Settings refuses names it does not know, and the timeouts are newer than the oldest wandb we take.
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})


def _first_line(error: Exception) -> str:
    logging.getLogger(__name__).debug("W&B could not start", exc_info=error)
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
