"""A tiny base, two adapters on it and what they answer by transformers and PEFT alone, written for any server.

``python tests/conformance_parts.py FOLDER`` writes ``base/``, ``adapters/{red,green}/`` and ``expected.json``. The
heads are 32 wide, the least that vLLM's attention takes on a CPU; of the adapters one reaches the linear layers, the
other embeddings and head too.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from tiny_models import chatml_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "colour is red"}]
PROMPT = "colour is"
TOKENS = 12
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"red": _LINEAR, "green": [*_LINEAR, "embed_tokens", "lm_head"]}


def model() -> Any:
    """Seeded random weights; answers vary, and the likeliest token is so by a margin."""
    config = LlamaConfig(
        vocab_size=400, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Never the likeliest: servers differ in what they make of half a character.
    with torch.no_grad():
        made.lm_head.weight[_unreadable()] = 0
    return made


def _unreadable() -> list[int]:
    tokenizer = chatml_tokenizer()
    texts = [tokenizer.decode([token]) for token in range(400)]
    special = set(tokenizer.all_special_ids)
    return [n for n, text in enumerate(texts) if n in special or not (text.isascii() and text.isprintable())]


def write(folder: Path) -> Path:
    """See the module."""
    tokenizer = chatml_tokenizer()
    model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for seed, (name, targets) in enumerate(TARGETS.items(), 1):
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        adapted = get_peft_model(model(), config)
        torch.manual_seed(seed)
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.1)
            if "lm_head.lora_B" in key:
                weight.data[_unreadable()] = 0
        adapted.save_pretrained(folder / "adapters" / name, save_embedding_layers=False)
    chat = tokenizer.apply_chat_template(
        MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    plain = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    expected = {
        name: {
            "chat": _answer(tokenizer, chat, folder, name),
            "plain": _answer(tokenizer, plain, folder, name),
            "chat_logprobs": _first_logprobs(chat, folder, name),
        }
        for name in ("base", *TARGETS)
    }
    counts = {"chat_tokens": len(chat), "plain_tokens": len(plain)}
    (folder / "expected.json").write_text(json.dumps({"answers": expected, **counts}), encoding="utf-8")
    return folder


def _loaded(folder: Path, name: str) -> Any:
    return (
        model() if name == "base" else PeftModel.from_pretrained(model(), folder / "adapters" / name).eval()
    )


def _answer(tokenizer: Any, prompt: list[int], folder: Path, name: str) -> dict[str, Any]:
    """The greedy answer of at most ``TOKENS`` tokens: its text, tokens counted with the stop, and how it ends."""
    made, ids = _loaded(folder, name), list(prompt)
    with torch.inference_mode():
        for _ in range(TOKENS):
            ids.append(int(made(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    told = ids[len(prompt) :]
    is_stopped = told[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(told, skip_special_tokens=True)
    return {"text": text, "tokens": len(told), "finish": "stop" if is_stopped else "length"}


def _first_logprobs(prompt: list[int], folder: Path, name: str) -> list[float]:
    """Of the three likeliest first tokens."""
    with torch.inference_mode():
        row = _loaded(folder, name)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    return [float(value) for value in row.topk(3).values]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
