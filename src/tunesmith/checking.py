"""``tunesmith check``: configuration and data, without weights."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tunesmith.assembly import TextParts, assemble_text, held_out, refuse_contradictions, rows_per_step
from tunesmith.config.load import LoadedConfig
from tunesmith.data.lengths import LengthCensus, census
from tunesmith.data.order import step_rows
from tunesmith.data.preview import preview, trained_text
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import ConfigError
from tunesmith.planned_adapter import planned
from tunesmith.run_record import config_notices
from tunesmith.serving.findings import Finding
from tunesmith.training.schedule import plan_steps

ServingEngine = Literal["tunesmith", "vllm"]


@dataclass(frozen=True)
class SplitFacts:
    """One split's census, and the padding that batches of whole rows would add."""

    name: str
    path: str
    sha256: str
    skipped: int
    census: LengthCensus
    trained_share: float
    padding_share: float  # of all computed tokens, were each step one padded block in data order


@dataclass(frozen=True)
class CheckResult:
    """What ``check`` found; problems were raised as errors before."""

    task: str
    context_length: int
    method: str
    steps: int
    epochs: int
    rows_per_step: int
    splits: tuple[SplitFacts, ...]
    notices: tuple[str, ...]
    previews: tuple[Text, ...]
    trained_texts: tuple[list[str], ...]
    engine: ServingEngine | None = None  # that was asked for
    findings: tuple[Finding, ...] = ()  # what it would refuse

    def refuse_unserved(self) -> None:
        """Raise ConfigError where the engine that was asked for would not serve what is trained, as trained."""
        fatal = [finding for finding in self.findings if finding.is_fatal]
        if fatal:
            what = "1 setting" if len(fatal) == 1 else f"{len(fatal)} settings"
            remedy = (
                "change it, or serve with another engine"
                if len(fatal) == 1
                else "change them, or serve otherwise"
            )
            raise ConfigError(
                f"--for-serving {self.engine}", f"{what} would not be served as trained, see above", remedy
            )

    def facts(self) -> dict[str, Any]:
        """The same, JSON-serialisable."""
        plain = {
            name: getattr(self, name) for name in ("task", "context_length", "method", "steps", "epochs")
        }
        return plain | {
            "rows_per_step": self.rows_per_step,
            "splits": [asdict(split) for split in self.splits],
            "notices": list(self.notices),
            "trained_texts": list(self.trained_texts),
            "for_serving": self.engine,
            "findings": [finding.facts() for finding in self.findings],
        }


def check_config(
    loaded: LoadedConfig,
    *,
    preview_rows: int,
    skip_bad_rows: bool,
    say: Callable[[str], None],
    engine: ServingEngine | None = None,
) -> CheckResult:
    """Check a configuration and its data; for ``engine`` also whether it would serve what is trained.

    Raises:
        ConfigError, DataError, ModelError: as a run would, before any weight is loaded.
    """
    refuse_contradictions(loaded)
    text = assemble_text(loaded, weights=False, skip_bad_rows=skip_bad_rows, say=say)
    settings = loaded.config.optimization
    devices = loaded.config.cluster.num_devices
    batch = rows_per_step(settings.train_batch_size_per_device, settings.gradient_accumulation_steps, devices)
    splits = [("train", text.splits.train), ("valid", text.splits.valid)]
    facts = tuple(_facts(name, rows, text.context_length, batch) for name, rows in splits if rows is not None)
    fitted = text.splits.fitted(text.context_length, loaded.config.data.on_too_long)
    held_out(loaded, text, fitted, skip_bad_rows=skip_bad_rows)  # for the errors it raises
    plan = plan_steps(len(fitted.train), batch, settings.num_epochs, settings.min_update_steps)
    findings = _findings(loaded, text, engine) if engine else ()
    shown = [fitted.train.row(i) for i in range(min(preview_rows, len(fitted.train)))]
    return CheckResult(
        task=fitted.train_on.value,
        context_length=text.context_length,
        method=loaded.config.method.kind,
        steps=plan.total_steps,
        epochs=plan.epochs,
        rows_per_step=batch,
        splits=facts,
        notices=tuple(config_notices(loaded, plan.total_steps)),
        previews=tuple(preview(row, text.tokenizer) for row in shown),
        trained_texts=tuple(trained_text(row, text.tokenizer) for row in shown),
        engine=engine,
        findings=findings,
    )


def _findings(loaded: LoadedConfig, text: TextParts, engine: ServingEngine) -> tuple[Finding, ...]:
    # The rules import PEFT, seconds that a plain check has no use for.
    from tunesmith.serving.own_rules import own_findings
    from tunesmith.serving.vllm_rules import vllm_findings

    subject = planned(loaded, text.base, text.context_length, text.model_limit)
    if subject is None:  # every weight is trained: a model like any other, without adapters
        return ()
    return tuple(vllm_findings(subject) if engine == "vllm" else own_findings(subject))


def _facts(name: str, rows: TokenizedRows, limit: int, batch: int) -> SplitFacts:
    count = census(rows, limit)
    lengths = rows.lengths
    padded = sum(len(step) * int(lengths[step].max()) for step in step_rows(len(rows), batch, 0, 1))
    return SplitFacts(
        name, rows.path, rows.sha256, rows.skipped, count,
        count.trained_tokens / count.tokens, 1 - count.tokens / padded,
    )  # fmt: skip


def print_check(console: Console, result: CheckResult) -> None:
    """The census as a table, notices, and the coloured rows."""
    table = Table(title="Tokens", title_justify="left", header_style="bold")
    for heading in (
        "split",
        "rows",
        "tokens",
        "trained",
        "p50",
        "p95",
        "longest",
        "over limit",
        "padding saved",
    ):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split in result.splits:
        c = split.census
        table.add_row(
            split.name, f"{c.rows:,}", f"{c.tokens:,}", f"{split.trained_share:.1%}", str(c.p50), str(c.p95),
            str(c.longest), f"{c.rows_over:,}", f"{split.padding_share:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"Task {result.task}; {result.method}; context_length {result.context_length:,}; "
        f"{result.steps:,} steps of {result.rows_per_step} rows, epochs: {result.epochs}"
    )
    for notice in result.notices:
        console.print(Text(f"Note: {notice}", style="yellow"))
    for number, text in enumerate(result.previews, 1):
        console.print(Panel(text, title=f"row {number}: trained tokens on green", title_align="left"))
    for finding in result.findings:
        text = Text(f"{'Not served' if finding.is_fatal else 'Note'}: {finding}")
        text.stylize("red" if finding.is_fatal else "yellow")
        console.print(text, soft_wrap=True)
    if any(finding.is_fatal for finding in result.findings):
        return
    console.print(Text("Configuration and data are good.", style="bold green"))
    if result.engine:
        console.print(Text(f"{result.engine} would serve what is trained.", style="bold green"))
