"""Rows as the model sees them, trained tokens standing out: look before anyone pays for training."""

from typing import Any

from rich.text import Text

from tunesmith.data.rendering import TokenizedExample

TRAINED_STYLE = "bold black on green"
CONTEXT_STYLE = "dim"


def preview(row: TokenizedExample, tokenizer: Any) -> Text:
    """The row's text; trained tokens on green, so that colour and weight both tell them apart."""
    text = Text()
    for ids, trained in _runs(row):
        # Tokens are decoded a run at a time: one character may be spread over several tokens.
        shown = str(tokenizer.decode(ids)).replace("\n", "↵\n")
        text.append(shown, style=TRAINED_STYLE if trained else CONTEXT_STYLE)
    return text


def trained_text(row: TokenizedExample, tokenizer: Any) -> list[str]:
    """The text of each unbroken run of trained tokens, end-of-turn tokens included."""
    return [str(tokenizer.decode(ids)) for ids, trained in _runs(row) if trained]


def _runs(row: TokenizedExample) -> list[tuple[list[int], bool]]:
    runs: list[tuple[list[int], bool]] = []
    for token, trained in zip(row.ids.tolist(), row.trained.tolist(), strict=True):
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return runs
