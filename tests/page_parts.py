"""The report of a run, as ``finetune`` leaves it, for the cards of the server's page."""

import json

from tunesmith.tracking.events import RunRecord, Score
from tunesmith.tracking.jsonl import plain

BEFORE = Score(100, 4.75, 115.5843, "record_match", 0.0, (0.0, 0.037))
AFTER = Score(100, 0.0522, 1.0536, "record_match", 0.64, (0.5424, 0.7273))


def report(run: str, tag: str, after: Score = AFTER) -> str:
    """The content of ``report.json``."""
    record = RunRecord(
        run, tag, "lora", "tiny", "instruction_tuning", "finished", 100, 2, 400, 1.0, None, 1, 1, None, None, 1,
        None, 1, 2, None, None, 0.0572, None, BEFORE, after, (), {}, {}, {},
    )  # fmt: skip

    return json.dumps(plain(record))
