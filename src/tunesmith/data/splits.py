"""The rows of a run: training and validation splits, brought to one task and one context length."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.data.conversation import detect_task
from tunesmith.data.lengths import OnTooLong, fit_to_length
from tunesmith.data.rendering import Renderer, TrainOn
from tunesmith.data.rows import TokenizedRows, tokenize_rows
from tunesmith.errors import ConfigError

Task = Literal["auto", "causal_lm", "instruction_tuning"]


@dataclass(frozen=True)
class Splits:
    """Tokenised rows before anything is cut. ``valid`` is None where no validation rows are named."""

    train: TokenizedRows
    valid: TokenizedRows | None
    train_on: TrainOn

    @property
    def longest(self) -> int:
        """Tokens of the longest row of either split."""
        return max(int(rows.lengths.max()) for rows in (self.train, self.valid) if rows is not None)

    def fitted(self, limit: int, on_too_long: OnTooLong) -> "Splits":
        """The same splits with no row longer than ``limit``. Raises DataError as ``fit_to_length``."""
        valid = fit_to_length(self.valid, limit, on_too_long) if self.valid is not None else None
        return Splits(fit_to_length(self.train, limit, on_too_long), valid, self.train_on)


def load_splits(
    train_path: str,
    valid_path: str | None,
    renderer: Renderer,
    task: Task,
    *,
    cache_dir: Path | None,
    skip_bad_rows: bool = False,
    on_progress: Callable[[str, int], None] = lambda _label, _done: None,
) -> Splits:
    """Read, check and tokenise both splits.

    Raises:
        DataError: as ``tokenize_rows``.
    """
    train_on = TrainOn(detect_task(train_path) if task == "auto" else task)

    def load(path: str) -> TokenizedRows:
        return tokenize_rows(
            path,
            renderer,
            train_on,
            cache_dir=cache_dir,
            skip_bad_rows=skip_bad_rows,
            on_progress=lambda done: on_progress(path, done),
        )

    return Splits(load(train_path), load(valid_path) if valid_path else None, train_on)


def choose_context_length(
    asked: int | None, model_limit: int | None, longest: int, scaling: Literal["none", "linear"], place: str
) -> int:
    """The longest row that is trained: as asked, else the longest row within the model's limit.

    Raises:
        ConfigError: more is asked than the model reads, and no scaling is allowed.
    """
    if asked is None:
        return min(longest, model_limit or longest)
    if model_limit and asked > model_limit and scaling == "none":
        raise ConfigError(
            place,
            f"is {asked:,}, but the model was made for {model_limit:,} tokens",
            "lower it, or set embedding_scaling_technique to linear",
        )
    return asked
