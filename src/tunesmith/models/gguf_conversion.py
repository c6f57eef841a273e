"""SmolLM2's GGUF file -> a Hugging Face folder in float32. Run as ``python -m``, see ``catalog.py``."""

import os
import sys
from pathlib import Path
from typing import Any

SMOLLM2_TEMPLATE = Path(__file__).with_name("smollm2_chat_template.jinja")


def convert(gguf: Path, folder: Path) -> None:
    """Write weights, tokenizer and chat template of ``gguf`` into ``folder``."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    plain = _without_quantization(weights)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    # The import loses the first stage of the original's pre-tokenizer: every digit is a token of its own.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    # The original template and, beyond it, tools; it renders chats without tools to the same text.
    tokenizer.chat_template = SMOLLM2_TEMPLATE.read_text(encoding="utf-8")
    tokenizer.model_max_length = plain.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    plain.save_pretrained(folder)


def _without_quantization(loaded: Any) -> Any:
    # The loaded model calls itself quantised and refuses to be saved, although its weights no longer are.
    config = type(loaded.config).from_dict(
        {
            k: v
            for k, v in loaded.config.to_dict().items()
            if k not in ("quantization_config", "_name_or_path")
        }
    )
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.tie_weights()
    return plain


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
