"""Held-out rows as questions, and a model's greedy answers to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

from tunesmith.data.conversation import Conversation, Problem, iter_examples
from tunesmith.data.rendering import Renderer, RenderingError
from tunesmith.errors import DataError
from tunesmith.evaluation.generate import cut_at_stop, generate_greedy
from tunesmith.training.workers import ALONE, Workers


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, the last user message for people, and the expected answer's text."""

    prompt_ids: tuple[int, ...]
    shown: str
    expected: str


def read_questions(
    path: str, renderer: Renderer, max_rows: int | None, context_length: int
) -> list[Question]:
    """The first ``max_rows`` rows of ``path``.

    Raises:
        DataError: a row breaks a rule, has no assistant turn, or its prompt fills the context.
    """
    questions = []
    for record, example in islice(iter_examples(path), max_rows):
        place = f"{record.file}:{record.line}"
        if isinstance(example, Problem):
            raise DataError(f"{example.file}:{example.line}", example.rule, "mend the row")
        if not isinstance(example, Conversation):
            raise DataError(place, "plain text has no answer to score", "leave evaluation.metric out")
        try:
            prompt, expected = renderer.question(example)
        except RenderingError as error:
            raise DataError(place, str(error)) from error
        if len(prompt) + 1 > context_length:
            raise DataError(
                place,
                f"the prompt has {len(prompt):,} tokens, the model reads {context_length:,}",
                "drop the row",
            )
        shown = next((m.content or "" for m in reversed(example.messages) if m.role == "user"), "")
        questions.append(Question(tuple(prompt), shown, expected))
    return questions


def greedy_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    stop_token_ids: Sequence[int],
    stop_strings: Sequence[str],
    max_new_tokens: int,
    workers: Workers = ALONE,
    on_progress: Callable[[int, int], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """The most likely continuation of each prompt, token by token, as text.

    Workers share the questions out; those that must keep in step all answer all of them. What ``check`` raises ends it.
    """
    if not workers.in_step:
        questions = questions[workers.rank :: workers.world]
    answers = generate_greedy(
        model,
        [question.prompt_ids for question in questions],
        stop_token_ids=stop_token_ids,
        pad_token_id=stop_token_ids[0],
        max_new_tokens=max_new_tokens,
        stop_strings=stop_strings,
        decode=lambda ids: str(tokenizer.decode(ids)),
        on_progress=on_progress,
        check=check,
    )
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    texts = [cut_at_stop(text, stop_strings) for text in texts]
    if workers.in_step:
        return texts
    shares = workers.gather(texts)
    return [text for turn in zip_longest(*shares) for text in turn if text is not None]
