"""How much memory ``generate_greedy`` takes beside the weights: the cache at its longest, and one pass over prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.evaluation.generate import BATCH_TOKENS, READ_TOKENS, groups


@dataclass(frozen=True)
class ModelSizes:
    """What decides the memory of a decoder's forward pass: elements a token, and bytes an element."""

    layers: int
    width: int
    inner: int
    queries: int
    keys: int  # of all heads of keys; as many values
    vocabulary: int
    element: int


def sizes_of(model: Any) -> ModelSizes:
    """Read from the configuration that transformers keeps with a decoder of the Llama kind."""
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * size
    return ModelSizes(
        config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads * size, keys,
        config.vocab_size, next(model.parameters()).element_size(),
    )  # fmt: skip


def generation_bytes(
    sizes: ModelSizes, lengths: Sequence[int], max_new_tokens: int, batch_tokens: int = BATCH_TOKENS
) -> int:
    """Bytes of the batch that takes most, were every answer ``max_new_tokens`` long; ``lengths``: tokens of prompts."""
    most = 0
    for group in groups(lengths, max_new_tokens, batch_tokens):
        rows, longest = len(group), max(lengths[i] for i in group)
        places = longest + max_new_tokens
        cache = 2 * sizes.layers * sizes.keys * rows * places
        # While prompts are read the cache holds them alone; while answers are made a pass is over one token a row.
        together = min(rows, max(1, READ_TOKENS // longest)) * longest
        read = cache * longest // places + together * _of_a_pass(sizes)
        write = cache + 2 * sizes.queries * rows * places + rows * sizes.vocabulary
        most = max(most, read, write)
    return most * sizes.element


def _of_a_pass(sizes: ModelSizes) -> int:
    """Elements a token that a layer takes as transformers and PEFT compute it.

    Attention: the block's input, its norm and a temporary; queries, five steps of rotating them, keys and values for
    all heads; keys and values. Then the MLP: the activated gate, the other half, its adapter's part and their sum.
    The sum of both, not the larger: what the first gave back the allocator keeps in pieces too small for the second.
    """
    return 3 * sizes.width + 8 * sizes.queries + 2 * sizes.keys + 4 * sizes.inner
