"""What a finished run shows on the console: before and after, sample answers, the best checkpoint."""

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.tracking.events import RunRecord, SampleAnswer
from tunesmith.tracking.formats import compare, count, number, same_answer, shorten, visible

_SAMPLES = 3
_PROMPT_CHARACTERS = 300
_ANSWER_CHARACTERS = 400


def score_table(record: RunRecord) -> RenderableType | None:
    """Base against tuned model on the held-out rows; None where neither was scored."""
    if record.before is None and record.after is None:
        return None
    rows = next(score.rows for score in (record.after, record.before) if score is not None)
    table = Table(box=box.SIMPLE_HEAD, title=f"Held-out rows: {count(rows)}", title_justify="left")
    table.add_column("")
    for heading in ("base", "tuned", "change"):
        table.add_column(heading, justify="right")
    for line in compare(record.before, record.after):
        style = "" if line.better is None else "green" if line.better else "red"
        table.add_row(Text(line.label), Text(line.before), Text(line.after), Text(line.change, style))
    has_interval = any(score and score.interval for score in (record.before, record.after))
    return Group(table, Text("  numbers in [ ] are 95 % intervals", style="dim")) if has_interval else table


def sample_table(samples: tuple[SampleAnswer, ...]) -> RenderableType | None:
    """The first three samples, answers side by side; None where there are none.

    A tuned answer that equals the expected one, whitespace aside, is green.
    """
    shown = samples[:_SAMPLES]
    if not shown:
        return None
    parts: list[RenderableType] = []
    for place, sample in enumerate(shown, start=1):
        prompt = shorten(visible(sample.prompt.strip()), _PROMPT_CHARACTERS)
        parts.append(Text.assemble((f"Sample {place}: ", "bold"), prompt))
        table = Table(box=box.SIMPLE_HEAD, expand=True, show_lines=False)
        for heading in ("expected", "base", "tuned"):
            table.add_column(heading, ratio=1, overflow="fold")
        equal = same_answer(sample.expected, sample.after)
        table.add_row(
            _answer(sample.expected),
            Text("not asked", style="dim") if sample.before is None else _answer(sample.before),
            _answer(sample.after, "green" if equal else ""),
        )
        parts.append(table)
    right = sum(same_answer(sample.expected, sample.after) for sample in shown)
    # Said in words too: colour is not seen by everyone, nor kept in a log.
    parts.append(Text(f"{right} of {len(shown)} tuned answers equal the expected one.", style="dim"))
    return Group(*parts)


def print_closing(console: Console, record: RunRecord) -> None:
    """The last lines: where the best checkpoint is, its eval loss and perplexity.

    The path stands alone on its line, never wrapped or cut, so it can be copied and parsed.
    """
    if record.best_checkpoint is None:
        console.print(Text(f"No checkpoint was saved (run {visible(record.status)})."))
        return
    console.print(Text("Best checkpoint is stored in:", style="bold"))
    console.print(Text(visible(record.best_checkpoint)), soft_wrap=True)
    if record.eval_loss is not None:
        line = f"Eval loss: {number(record.eval_loss)}, perplexity: {number(record.perplexity)}"
        console.print(Text(line))


def print_summary(console: Console, record: RunRecord) -> None:
    """Print all of it, leaving out what the run did not measure."""
    for part in (score_table(record), sample_table(record.samples)):
        if part is not None:
            console.print()
            console.print(part)
    console.print()
    print_closing(console, record)


def _answer(text: str, style: str = "") -> Text:
    stripped = shorten(visible(text.strip()), _ANSWER_CHARACTERS)
    return Text(stripped, style) if stripped else Text("(empty)", style="dim")
