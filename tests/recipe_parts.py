"""The shipped recipes for models of billions of parameters, and their architectures made tiny."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
)

import tiny_models
from tunesmith.config.load import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
ARCHITECTURES = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama",
    "meta-llama/Meta-Llama-3-70B-Instruct": "llama",
    "meta-llama/Meta-Llama-Guard-2-8B": "llama",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral",
    "google/gemma-2-9b-it": "gemma2",
    "google/gemma-2-27b-it": "gemma2",
}
# Those that the recipes' prompt formats write.
CONTROL_TOKENS = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>", "<|eot_id|>")


def recipe_names() -> list[str]:
    """Shipped configurations but those of the default model, which `make run` trains."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("smollm2-"))


def architecture(name: str) -> str:
    return ARCHITECTURES[load_config(str(CONFIGS / f"{name}.yaml")).config.model.model_id]


def tiny_config(kind: str) -> PreTrainedConfig:
    """Two layers, hidden 32, and the family's own parts: experts, sliding windows, capped scores."""
    common: dict[str, Any] = {
        "vocab_size": 448, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8192,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    if kind == "mistral":
        return MistralConfig(**common, sliding_window=4096, tie_word_embeddings=False)
    if kind == "mixtral":
        return MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    if kind == "gemma2":
        return Gemma2Config(**common, query_pre_attn_scalar=8, sliding_window=4096)
    return LlamaConfig(**common, tie_word_embeddings=False)


def save_tiny(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).save_pretrained(folder)
    tokenizer = tiny_models.chatml_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    tokenizer.save_pretrained(folder)
    return folder
