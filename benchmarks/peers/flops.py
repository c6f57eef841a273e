"""The floating-point operations that a training step needs, and how fast this machine multiplies matrices."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Weights:
    """Linear layers of a Llama-like decoder.

    Attributes:
        layers: number of blocks.
        shapes: (inputs, outputs) of each linear layer of one block.
        head: (inputs, outputs) of the head.
    """

    layers: int
    shapes: tuple[tuple[int, int], ...]
    head: tuple[int, int]

    @property
    def body(self) -> int:
        """Weights in the matrix products of all blocks."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.shapes)


def weights_of(config: Mapping[str, Any]) -> Weights:
    """Read from a Hugging Face config.json of a model with q, k, v, o, gate, up and down projections."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    queries = heads * head_size
    keys = (config.get("num_key_value_heads") or heads) * head_size
    attention = ((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden))
    mlp = ((hidden, inner), (hidden, inner), (inner, hidden))
    return Weights(config["num_hidden_layers"], attention + mlp, (hidden, config["vocab_size"]))


def needed_flops(weights: Weights, method: str, computed_tokens: int, trained_tokens: int) -> float:
    """FLOPs that cannot be left out of a training step.

    A product with a weight matrix of n entries takes 2n FLOPs a token: once forward, once for the gradient of its
    input, and, where the matrix itself is trained (``full``), once for its own gradient. Blocks are counted on
    ``computed_tokens``, the head on ``trained_tokens``. Left out, since small here: attention scores, the
    adapter's own products (rank 8 adds about 4 % to LoRA's), norms and activations. A program that computes more
    than this (padding, the head on every token) is less efficient by this measure, which is its purpose.

    Args:
        weights: the model.
        method: "lora" (frozen base) or "full".
        computed_tokens: tokens that went through the blocks, without padding.
        trained_tokens: tokens with a loss.
    """
    passes = {"lora": 2, "full": 3}[method]
    inputs, outputs = weights.head
    return 2.0 * passes * (weights.body * computed_tokens + inputs * outputs * trained_tokens)


def matmul_rate(weights: Weights, tokens: int, threads: int, repeats: int = 5) -> float:
    """FLOPs a second of ``torch.mm`` in float32 on the shapes of one block, ``tokens`` rows high.

    Forward and input-gradient products are both timed; of each the best of ``repeats``. Call it in a process of
    its own: it sets the thread count.
    """
    import torch

    torch.set_num_threads(threads)
    flops, seconds = 0.0, 0.0
    for inputs, outputs in weights.shapes:
        weight = torch.randn(outputs, inputs)
        for rows, right in ((torch.randn(tokens, inputs), weight.T), (torch.randn(tokens, outputs), weight)):
            times = []
            for _ in range(repeats + 1):
                begun = time.perf_counter()
                torch.mm(rows, right)
                times.append(time.perf_counter() - begun)
            flops += 2.0 * tokens * inputs * outputs
            seconds += min(times[1:])
    return flops / seconds
