"""Batched greedy generation that gives each prompt the answer it would get alone."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.errors import ModelError, NonFiniteError
from tunesmith.evaluation.answer_cache import answer_cache, parts
from tunesmith.free_memory import give_back_memory
from tunesmith.models.device import computing_device

# A batch is made smaller once this share of its rows is done. Making it smaller copies what is left of
# the cache, about what one more step costs anyway, so waiting for more finished rows would not pay.
_DROP_AT = 0.25
BATCH_TOKENS = 8192  # of prompts and answers that go through the model together
# Of prompts that are read at once, where the model's cache allows parts. Products are as fast with more, and what a
# pass takes beside the weights grows with them, PEFT's adapters doubling it.
READ_TOKENS = 1024


@dataclass(frozen=True)
class _StopRule:
    """When an answer is complete."""

    token_ids: frozenset[int]
    max_new_tokens: int
    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str] | None

    def take(self, answer: list[int], token: int) -> bool:
        """Add ``token`` to ``answer`` unless it is a stop token; True if the answer is now complete."""
        if token in self.token_ids:
            return True
        answer.append(token)
        if len(answer) >= self.max_new_tokens:
            return True
        if not self.strings or self.decode is None:
            return False
        # The whole answer is decoded each time: what the last tokens mean as text depends on those before.
        text = self.decode(answer)
        return any(stop in text for stop in self.strings)


def generate_greedy(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Collection[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
    stop_strings: Sequence[str] = (),
    decode: Callable[[Sequence[int]], str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Continue each prompt with the most likely tokens.

    Args:
        model: a causal language model in the manner of transformers, PEFT-wrapped or not. It is called
            with ``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values`` and
            ``use_cache``, and with ``logits_to_keep`` if it takes that. Put in evaluation mode meanwhile.
        prompts: token ids of each prompt, none of them empty.
        stop_token_ids: an answer ends before the first of these.
        pad_token_id: any id of the vocabulary; padding is masked by place, so it may be a stop token too.
        max_new_tokens: the longest an answer may get, at least 1.
        batch_tokens: prompts go through the model together while rows x (longest prompt +
            ``max_new_tokens``) stays within this; a longer prompt goes alone.
        on_progress: called with (prompts done, all prompts) whenever further prompts are done.
        stop_strings: an answer also ends with the token that completes one of these. That token stays,
            since a stop string may start inside a token: cut the decoded text with ``cut_at_stop``.
        decode: token ids to text; needed for ``stop_strings``.
        check: called before each pass through the model; what it raises ends the generation.

    Returns:
        The new token ids of each prompt, in the order of ``prompts``, without prompt and stop token.

    Raises:
        ValueError: an empty prompt or stop string, ``max_new_tokens`` below 1, stop strings without
            ``decode``.
        ModelError: the model returned no cache.
        NonFiniteError: a logit was NaN.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be at least 1")
    if stop_strings and decode is None:
        raise ValueError("stop_strings need decode")
    if "" in stop_strings:
        raise ValueError("an empty stop string ends every answer")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("an empty prompt has no next token")
    rule = _StopRule(frozenset(stop_token_ids), max_new_tokens, tuple(stop_strings), decode)
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    with _evaluation_mode(model), torch.inference_mode():
        for group in groups([len(prompt) for prompt in prompts], max_new_tokens, batch_tokens):
            batch = [(prompts[row], answers[row]) for row in group]
            for finished in _generate_batch(model, batch, rule, pad_token_id, check):
                done += finished
                if on_progress is not None:
                    on_progress(done, len(prompts))
            give_back_memory()
    return answers


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """``text`` up to the first place where any of ``stop_strings`` starts."""
    starts = [text.find(stop) for stop in stop_strings]
    return text[: min((start for start in starts if start >= 0), default=len(text))]


def groups(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts that go together, longest first: a batch that does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // (lengths[order[start]] + max_new_tokens))
        yield order[start : start + rows]
        start += rows


def _generate_batch(
    model: torch.nn.Module,
    batch: Sequence[tuple[Sequence[int], list[int]]],
    rule: _StopRule,
    pad_token_id: int,
    check: Callable[[], None],
) -> Iterator[int]:
    """Fill the answers of one batch of (prompt, answer), yielding how many rows each step finished."""
    device = computing_device(model)
    input_ids, mask, next_position = _left_padded(
        [prompt for prompt, _ in batch], pad_token_id, rule.max_new_tokens, device
    )
    width = input_ids.shape[1]
    position_ids = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    last_only = {"logits_to_keep": 1} if _takes_logits_to_keep(model) else {}
    answers = [answer for _, answer in batch]
    running = [True] * len(answers)
    # Room for the prompts and all but the last token of their answers.
    cache = answer_cache(model, len(answers), mask.shape[1] - 1)
    stretches = parts(cache, len(answers), max(1, READ_TOKENS // width), width)
    while True:
        chosen = []
        for part in stretches:
            check()
            output = model(
                input_ids=input_ids[part],
                attention_mask=mask[part, :width],
                position_ids=position_ids[part],
                past_key_values=cache,
                use_cache=True,
                **last_only,
            )
            chosen.append(_most_likely(output.logits))
            if input_ids.shape[1] > 1:
                give_back_memory()
        if len(chosen) > 1 and output.past_key_values is not cache:
            raise ModelError(
                "generation",
                "the model leaves the key-value cache it is given",
                "set use_cache in its config",
            )
        cache, tokens, stretches = output.past_key_values, torch.cat(chosen), iter([slice(None)])
        before = sum(running)
        for row, token in enumerate(tokens.tolist()):
            running[row] = running[row] and not rule.take(answers[row], token)
        left = sum(running)
        if left < before:
            yield before - left
        if not left:
            return
        if cache is None:
            raise ModelError(
                "generation", "the model returned no key-value cache", "set use_cache in its config"
            )
        if left <= (1 - _DROP_AT) * len(running):
            kept = torch.tensor([row for row, runs in enumerate(running) if runs], device=device)
            # Not batch_select_indices: in transformers 5.23 that leaves out the convolution and recurrent
            # states of layers which have such states; reorder_cache takes every state along.
            cache.reorder_cache(kept)
            mask, tokens, next_position = mask[kept], tokens[kept], next_position[kept]
            answers = [answer for answer, runs in zip(answers, running, strict=True) if runs]
            running = [True] * left
        input_ids, position_ids = tokens[:, None], next_position[:, None]
        next_position = next_position + 1
        width += 1


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, max_new_tokens: int, device: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts (rows, longest) padded on the left, their mask and their lengths (rows); all int64.

    The mask (rows, longest + ``max_new_tokens``) has room for the answers, 1 there and on the prompt.
    """
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    mask = torch.ones((len(prompts), longest + max_new_tokens), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, : longest - len(prompt)] = 0
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return input_ids.to(device), mask.to(device), lengths.to(device)


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Token ids (rows) of the largest logits at the last place of ``logits`` (rows, places, vocabulary)."""
    largest, tokens = logits[:, -1].max(dim=-1)
    # max returns NaN if there is one, and the place of it would pass for a token
    if torch.isnan(largest).any():
        raise NonFiniteError("generation", "the model's logits are NaN", "check its weights and precision")
    return tokens


def _takes_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether the model can leave out the logits of the prompt, far its largest tensor."""
    # PEFT's own forward takes anything and hands it on
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. Restores each module's own mode: some may be frozen in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
