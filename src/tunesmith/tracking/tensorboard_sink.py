"""Events to TensorBoard event files."""

import json
import time
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, OutputError
from tunesmith.tracking.events import Event, RunStarted
from tunesmith.tracking.jsonl import plain
from tunesmith.tracking.scalars import scalars
from tunesmith.tracking.trouble import Trouble

_FLUSH_SECONDS = 10  # how far behind an open TensorBoard page may be


class TensorBoardSink:
    """Writes scalars, and the settings as a text, under ``directory``.

    It uses TensorBoard's own writer, not torch's, so no torch import is needed. A run that resumes
    into the same directory hides the points it replaces, as TensorBoard does after a restart.

    Args:
        directory: folder for the event files; made where missing.

    Raises:
        ConfigError: tensorboard is not installed.
        OutputError: ``directory`` cannot be written.
    """

    def __init__(self, *, directory: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            fault = "tensorboard is not installed"
            remedy = "run: pip install 'tunesmith[tensorboard]'"
            raise ConfigError("logger.provider", fault, remedy) from error
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = EventFileWriter(str(directory), flush_secs=_FLUSH_SECONDS)
        except OSError as error:
            raise OutputError(
                str(directory), error.strerror or str(error), "choose another folder"
            ) from error
        self._event, self._summary = event_pb2, summary_pb2
        self._trouble = Trouble("TensorBoard")
        self._started = False
        self._closed = False

    def emit(self, event: Event) -> None:
        if self._closed:
            return
        with self._trouble.caught():
            if isinstance(event, RunStarted):
                self._add(0, [_config_text(self._summary, plain(event.config))])
            points = scalars(event)
            if points:
                self._announce_start(points[0].step)
                value = self._summary.Summary.Value
                self._add(points[0].step, [value(tag=p.name, simple_value=p.value) for p in points])

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._trouble.caught():
            self._writer.close()

    def _add(self, step: int, values: list[Any]) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def _announce_start(self, step: int) -> None:
        """Readers drop what an earlier session wrote from ``step`` on, when they see this mark."""
        if self._started:
            return
        self._started = True
        mark = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, session_log=mark))


def _config_text(summary_pb2: Any, config: dict[str, Any]) -> Any:
    from tensorboard.plugins.text import metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    # Four leading blanks make a code block of it in the Text tab.
    text = "\n".join("    " + line for line in json.dumps(config, indent=2).splitlines())
    return summary_pb2.Summary.Value(
        tag="config",
        metadata=metadata.create_summary_metadata(display_name="config", description=""),
        tensor=make_tensor_proto(text.encode()),
    )
