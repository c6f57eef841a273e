"""Tiny models on disk, made in a fraction of a second: real architectures, real tokenizers, random weights."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLOURS = ("red", "blue", "green", "black", "white")


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the ChatML control tokens; pad = eos, as SmolLM2 has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system colour is red blue green"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    return fast


def tiny_config(kind: str = "llama", *, tied: bool = True, vocab_size: int = 400) -> PreTrainedConfig:
    """Two layers, hidden 32; grouped-query attention where the family has it."""
    common = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2, "tie_word_embeddings": tied,
    }  # fmt: skip
    if kind == "neox":
        return GPTNeoXConfig(**common, attention_dropout=0.0, hidden_dropout=0.0)
    grouped = {**common, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3Config(**grouped) if kind == "qwen3" else LlamaConfig(**grouped)


def tiny_model(
    kind: str = "llama", *, tied: bool = True, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """A model with seeded random weights, in evaluation mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, tied=tied), dtype=dtype).eval()


def save_tiny_model(folder: Path, kind: str = "llama", *, tied: bool = True) -> Path:
    """A Hugging Face folder: config, weights, tokenizer, chat template."""
    tiny_model(kind, tied=tied).save_pretrained(folder)
    chatml_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, *, start: int = 0) -> Path:
    """Chats of which the answer repeats the question's colour."""
    lines = []
    for index in range(start, start + count):
        colour = COLOURS[index % len(COLOURS)]
        messages = [
            {"role": "user", "content": f"item {index} colour {colour}"},
            {"role": "assistant", "content": f"colour is {colour}"},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
