"""Parts of the tests of the serving engine: tiny bases and adapters on disk, requests, and what PEFT answers."""

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from tunesmith.models.base import BaseFolder
from tunesmith.models.lora import save_adapter
from tunesmith.serving.engine import CpuEngine
from tunesmith.serving.seam import AdapterKey, EngineError, Sampling, Ticket, Token

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL = [*LINEAR, "embed_tokens", "lm_head"]
VOCABULARY = 400
_KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"head_dim": 8, "tie_word_embeddings": True}),
    "untied": (LlamaConfig, {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"head_dim": 8, "sliding_window": 6}),
    "qwen2": (Qwen2Config, {}),
}


def save_base(folder: Path, kind: str = "llama") -> BaseFolder:
    """A base whose answers wander: weights ten times as wide as usual, biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    make, extra = _KINDS[kind]
    config = make(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2, **extra,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    return BaseFolder(f"tiny-{kind}", folder, None)


def plain_model(base: BaseFolder) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base.path).eval()
    model.generation_config.eos_token_id = None  # answers as long as asked for
    return model


def save_lora(base: BaseFolder, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """An adapter with random A and B."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings}
    )
    model = get_peft_model(plain_model(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    save_adapter(model, folder, base.model_id)
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(base: BaseFolder, adapter: Path | None, ids: Sequence[int], count: int) -> list[int]:
    """What plain transformers and PEFT generate greedily."""
    model = reference(base, adapter)
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([list(ids)]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
            max_new_tokens=count,
        )  # fmt: skip
    return found[0, len(ids) :].tolist()


def reference(base: BaseFolder, adapter: Path | None) -> Any:
    model = plain_model(base)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


class Answer:
    """Collects what is delivered; a delivery may be told to stop the engine's thread."""

    def __init__(self) -> None:
        self.got: queue.Queue[Token | EngineError] = queue.Queue()
        self.ticket: Ticket | None = None

    def __call__(self, what: Token | EngineError) -> None:
        self.got.put(what)

    def next(self) -> Token:
        found = self.got.get(timeout=30)
        if isinstance(found, EngineError):
            raise found
        return found

    def tokens(self) -> list[Token]:
        """All that are left."""
        found = [self.next()]
        while found[-1].finish is None:
            found.append(self.next())
        return found

    def ids(self) -> list[int]:
        return [token.id for token in self.tokens()]


def ask(
    engine: CpuEngine, ids: Sequence[int], adapter: AdapterKey | None = None, count: int = 8, **sampling: Any
) -> Answer:
    """Submit, greedily unless told otherwise."""
    answer = Answer()
    chosen = Sampling(**{"max_tokens": count, "temperature": 0.0, **sampling})
    answer.ticket = engine.submit(ids, adapter, chosen, answer)
    return answer
