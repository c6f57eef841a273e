"""What a model still can do that it was not tuned for: loss on general text, and choices among four answers.

``general/general_text.jsonl`` holds 60 rows ``{"subject", "text"}``, ``general/general_choice.jsonl`` 120 rows
``{"subject", "question", "options", "answer"}``, ``answer`` being the place of the right one. They were written for
this project, so nobody's licence hangs on them. They are few: enough to see a model drift or break, not to rank models.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.comparison.record import Estimate, Forgetting
from tunesmith.comparison.statistics import Values, difference
from tunesmith.data.batching import pad_rows, split_by_tokens
from tunesmith.data.conversation import PlainText, detect_task
from tunesmith.data.lengths import fit_to_length
from tunesmith.data.packing import pack_rows, split_packed
from tunesmith.data.rendering import Renderer, TokenizedExample, TrainOn
from tunesmith.data.rows import TokenizedRows, tokenize_rows
from tunesmith.errors import DataError, NonFiniteError
from tunesmith.evaluation.intervals import wilson
from tunesmith.models.batches import prepare_packing
from tunesmith.models.packed_attention import NAME
from tunesmith.models.passes import choose_passes
from tunesmith.models.servable import Servable, load_servable

SHIPPED = "shipped"
GENERAL_TEXT = Path(__file__).with_name("general") / "general_text.jsonl"
GENERAL_CHOICE = Path(__file__).with_name("general") / "general_choice.jsonl"
# Every token of a text is a target, and a target's logits take 4 bytes for each entry of the vocabulary.
_TOKEN_BUDGET = 1024

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Choice:
    """A question, its four options and the place of the right one."""

    subject: str
    question: str
    options: tuple[str, ...]
    answer: int

    @property
    def context(self) -> str:
        """What stands before an option; a blank comes between. The form of ARC in lm-evaluation-harness."""
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True)
class GeneralScore:
    """One model on one general text.

    Attributes:
        source: ``shipped``, or the file as the user named it.
        sums: float64, shape (rows,): sum of -log p over the targets of each row, in nats.
        counts: int64, shape (rows,): targets of each row.
        choices: whether each shipped question was answered right; None for a user's file.
    """

    source: str
    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    choices: tuple[bool, ...] | None

    @property
    def loss(self) -> float:
        """Nats a token; every token weighs the same."""
        return math.fsum(self.sums) / int(self.counts.sum())

    @property
    def accuracy(self) -> Estimate | None:
        """Share of questions answered right, with Wilson's interval."""
        if not self.choices:
            return None
        right, n = sum(self.choices), len(self.choices)
        return Estimate(right / n, wilson(right, n), n)


def measure_forgetting(
    checkpoint: str | Servable,
    before: Sequence[GeneralScore],
    *,
    arm: str,
    seed: int,
    output_dirs: Sequence[Path] = (),
    files: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> tuple[Forgetting, ...]:
    """What a checkpoint has lost or gained against its base, one entry for each text.

    Args:
        checkpoint: a run, tag or checkpoint folder (LoRA on its base, or full), or a model in memory.
        before: what ``measure_general`` found of the base, with the same ``files``.
        arm, seed: whose checkpoint it is.
        output_dirs, files, on_progress: as in ``measure_general``.

    Raises:
        As ``measure_general``; ValueError: ``before`` was measured on other texts.
    """
    after = measure_general(checkpoint, output_dirs=output_dirs, files=files, on_progress=on_progress)
    return compare_scores(before, after, arm=arm, seed=seed)


def measure_general(
    model: str | Servable,
    *,
    output_dirs: Sequence[Path] = (),
    files: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> tuple[GeneralScore, ...]:
    """The shipped texts and questions, then each of the user's files, through one model.

    Shipped rows that are longer than the model reads are left out, for base and checkpoints alike; a user's row that
    is, is refused.

    Args:
        model: what ``load_servable`` takes, or a model in memory.
        output_dirs: where runs and tags are looked for.
        files: JSONL of ``{"text": ...}``, of which every token is a target, or of chats, of which the assistant's are.
        on_progress: called with what is done, rows done, rows in all.

    Raises:
        DataError: a row of ``files`` breaks a rule or is too long; no shipped text is short enough.
        ModelError, CheckpointError: as ``load_servable``.
        NonFiniteError: a loss is not finite.
    """
    servable = load_servable(model, output_dirs) if isinstance(model, str) else model
    show = on_progress or (lambda _label, _done, _total: None)
    texts = general_rows(str(GENERAL_TEXT), servable.renderer)
    texts = fit_to_length(texts, servable.context_length, "drop")
    choices = _answered_right(servable, partial(show, "general choices"))
    sums = row_sums(servable, texts, partial(show, "general text"))
    found = [GeneralScore(SHIPPED, sums, texts.trained_counts, tuple(choices))]
    for file in files:
        rows = general_rows(file, servable.renderer)
        try:
            rows = fit_to_length(rows, servable.context_length, "error")
        except DataError as error:
            raise DataError(error.place, error.fault, "leave such rows out") from error
        sums = row_sums(servable, rows, partial(show, file))
        found.append(GeneralScore(file, sums, rows.trained_counts, None))
    return tuple(found)


def compare_scores(
    before: Sequence[GeneralScore], after: Sequence[GeneralScore], *, arm: str, seed: int
) -> tuple[Forgetting, ...]:
    """One entry for each text; the interval of the change is a paired bootstrap over its rows, as of two arms.

    The change is a ratio of sums over rows, (nats after - nats before) / tokens, so that long rows weigh as they do in
    the loss. A handful of rows that all go one way show nothing: see ``statistics``.

    Raises:
        ValueError: the texts or rows differ.
    """
    found = []
    for old, new in zip(before, after, strict=True):
        if old.source != new.source or not np.array_equal(old.counts, new.counts):
            raise ValueError(f"{old.source} and {new.source} are not the same rows")
        rows, weights = len(old.sums), old.counts.astype(np.float64)
        change, interval = difference(
            Values(new.sums[None], weights), Values(old.sums[None], weights), seed=0
        )  # fmt: skip
        found.append(
            Forgetting(
                arm=arm,
                seed=seed,
                source=old.source,
                loss_rows=rows,
                general_loss_before=old.loss,
                general_loss_after=new.loss,
                general_loss_change=Estimate(change, interval, rows),
                choice_accuracy_before=old.accuracy,
                choice_accuracy_after=new.accuracy,
            )
        )
    return tuple(found)


def shipped_choices() -> tuple[Choice, ...]:
    """The shipped questions, in file order."""
    lines = GENERAL_CHOICE.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return tuple(Choice(r["subject"], r["question"], tuple(r["options"]), r["answer"]) for r in rows)


def general_rows(path: str, renderer: Renderer) -> TokenizedRows:
    """The rows of a file as tokens.

    The end-of-sequence token behind a plain text is no target: tuning on chats changes when a model stops, and with
    short texts that would be most of what is seen.

    Raises:
        DataError: as ``tokenize_rows``.
    """
    train_on = TrainOn(detect_task(path))
    rows = tokenize_rows(path, renderer, train_on, cache_dir=None)
    if train_on is not TrainOn.ALL_TOKENS:
        return rows
    trained = np.array(rows.trained)
    trained[rows.starts[1:] - 1] = False
    rows = replace(rows, trained=trained)
    keep = np.flatnonzero(rows.trained_counts > 0)  # a text of one token predicts nothing
    return rows.select(keep, rows.lengths)


def choice_row(choice: Choice, option: str, renderer: Renderer) -> TokenizedExample:
    """Question and option as tokens, the option's being the targets.

    Both are encoded together and cut behind as many tokens as the question alone has, as lm-evaluation-harness does.
    """
    question = _text_ids(choice.context, renderer)
    ids = _text_ids(f"{choice.context} {option}", renderer)
    trained = np.zeros(len(ids), np.bool_)
    trained[min(len(question), len(ids) - 1) :] = True
    return TokenizedExample(ids, trained)


def _text_ids(text: str, renderer: Renderer) -> NDArray[np.int32]:
    return renderer.example(PlainText(text), TrainOn.ALL_TOKENS).ids[:-1]  # without the end of the sequence


def _answered_right(servable: Servable, on_progress: Callable[[int, int], None]) -> list[bool]:
    """Whether the likeliest option, by log-likelihood per character, is the right one.

    That is ``acc_norm`` of lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness): without
    the division, short options would win. Of equals the first counts. Chat templates are not used.
    """
    asked = []
    for choice in shipped_choices():
        rows = [choice_row(choice, option, servable.renderer) for option in choice.options]
        if max(len(row.ids) for row in rows) <= servable.context_length:
            asked.append((choice, rows))
    if not asked:
        return []
    sums = row_sums(servable, _gathered([row for _, rows in asked for row in rows]), on_progress)
    right, at = [], 0
    for choice, rows in asked:
        lengths = np.array([len(option) for option in choice.options])
        right.append(int(np.argmin(sums[at : at + len(rows)] / lengths)) == choice.answer)
        at += len(rows)
    return right


def _gathered(rows: Sequence[TokenizedExample]) -> TokenizedRows:
    return TokenizedRows(
        path=str(GENERAL_CHOICE),
        sha256="",
        ids=np.concatenate([row.ids for row in rows]),
        trained=np.concatenate([row.trained for row in rows]),
        starts=np.concatenate([[0], np.cumsum([len(row.ids) for row in rows])]).astype(np.int64),
        files=(str(GENERAL_CHOICE),),
        file_numbers=np.zeros(len(rows), np.int32),
        line_numbers=np.arange(len(rows), dtype=np.int32) // 4 + 1,
    )


def row_sums(
    servable: Servable, rows: TokenizedRows, on_progress: Callable[[int, int], None]
) -> NDArray[np.float64]:
    """Sum of -log p over the targets of each row, in nats, shape (rows,).

    Args:
        servable: the model.
        rows: each with at least one target.
        on_progress: called with rows done and rows in all.

    Raises:
        NonFiniteError: one is not finite.
    """
    model: Any = servable.model
    pad, device = servable.stops.token_ids[0], next(model.parameters()).device
    # A model that an earlier measurement has prepared to pack stays so.
    packs = model.config._attn_implementation == NAME or prepare_packing(model, rows, pad)[0]
    passes, _ = choose_passes(model, rows, packs=packs, autocast=None)
    every, most = range(len(rows)), _TOKEN_BUDGET
    groups = split_packed(rows, every, most) if packs else split_by_tokens(every, rows.lengths, most)
    sums, counts, done = np.zeros(len(rows)), rows.trained_counts, 0
    for group in groups:
        examples = [rows.row(i) for i in group]
        batch = pack_rows(examples, device) if packs else pad_rows(examples, pad, device)
        losses = passes.losses(batch).cpu().double().numpy()
        ends = np.cumsum(counts[group])
        sums[group] = [part.sum() for part in np.split(losses, ends[:-1])]
        done += len(group)
        on_progress(done, len(rows))
    if not np.isfinite(sums).all():
        place, remedy = f"{servable.name}, {rows.path}", "use an earlier checkpoint or a lower learning rate"
        raise NonFiniteError(place, "a loss is not finite", remedy)
    return sums
