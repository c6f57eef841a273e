"""Parts of the tests of the plain engine: bases of other families, and adapters of every kind."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    Qwen3Config,
)

from engine_parts import VOCABULARY, plain_model
from tunesmith.models.base import BaseFolder

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_CONFIGS: dict[str, Any] = {
    "qwen3": lambda: Qwen3Config(**_GROUPED, tie_word_embeddings=True),
    "neox": lambda: GPTNeoXConfig(**_COMMON, attention_dropout=0.0, hidden_dropout=0.0),
    # One layer with a window of 6 tokens, one without; embeddings that are scaled.
    "gemma3": lambda: Gemma3TextConfig(
        **_GROUPED, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    # One layer that is a convolution over the last tokens, whose state is no list of keys and values.
    "lfm2": lambda: Lfm2Config(
        **_COMMON, num_key_value_heads=2, layer_types=["conv", "full_attention"], conv_L_cache=3, block_multiple_of=8
    ),
}  # fmt: skip


def save_other_base(folder: Path, kind: str) -> BaseFolder:
    """A base whose answers wander."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_CONFIGS[kind]()).eval()
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name or "ln_" in name
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm and "bias" not in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    return BaseFolder(f"tiny-{kind}", folder, None)


def save_any(base: BaseFolder, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """An adapter all of whose tensors are random: pairs, magnitudes, biases, whole modules."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(plain_model(base), LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.normal_(std=0.15)
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
