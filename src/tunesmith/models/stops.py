"""Where an answer ends: the same for training, evaluation, export and serving."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stops:
    """Ids of tokens that end an answer, and texts that do but are no single token."""

    token_ids: tuple[int, ...]
    strings: tuple[str, ...]


def find_stops(
    tokenizer: Any, generation_config: Any, end_of_turn: str | None, stopping_sequences: Sequence[str]
) -> Stops:
    """All that ends an answer of this model.

    Args:
        tokenizer: its end-of-sequence token ends an answer.
        generation_config: the model's; its ``eos_token_id`` and ``stop_strings`` too.
        end_of_turn: the token that the chat template closes a turn with; what training teaches to say last.
        stopping_sequences: the user's.
    """
    ids, strings = {int(tokenizer.eos_token_id)}, []
    configured = getattr(generation_config, "eos_token_id", None)
    ids |= {int(i) for i in (configured if isinstance(configured, list) else [configured]) if i is not None}
    configured_texts = getattr(generation_config, "stop_strings", None) or []
    known = tokenizer.get_added_vocab()
    for text in [end_of_turn, *configured_texts, *stopping_sequences]:
        if text in known:
            ids.add(int(known[text]))
        elif text and text not in strings:
            strings.append(text)
    first = int(tokenizer.eos_token_id)
    return Stops((first, *sorted(ids - {first})), tuple(strings))
