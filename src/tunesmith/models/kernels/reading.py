"""A model of transformers, bare or within PEFT, read as a ``Decoder``; refused where the kernels would compute
something else."""

from typing import Any

import torch
from torch import nn

from tunesmith.models.kernels.arrangement import Shape
from tunesmith.models.kernels.decoder import Decoder
from tunesmith.models.kernels.layer import Layer, Norm
from tunesmith.models.kernels.linear import Adapter, Linear

# Families whose layers are those of ``layer.py``: pre-norm RMSNorm, rotary halves, gated SiLU.
_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")


class UnreadableError(Exception):
    """Why the kernels do not compute this model."""


def read_decoder(model: Any) -> Decoder:
    """The model's weights as data, nothing copied.

    Raises:
        UnreadableError: naming what the kernels do not have.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, config = getattr(plain, "model", None), plain.config
    layers = getattr(body, "layers", None)
    if body is None or not layers or any(type(layer).__name__ not in _LAYERS for layer in layers):
        kind = type(layers[0]).__name__ if layers else type(plain).__name__
        raise UnreadableError(f"{kind} is none of {', '.join(_LAYERS)}")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UnreadableError(f"its activation is {config.hidden_act}")
    if getattr(config, "attention_dropout", 0):
        raise UnreadableError("it has dropout in attention")
    return Decoder(
        embeddings=_embeddings(body.embed_tokens),
        untrained_token=body.embed_tokens.padding_idx
        if isinstance(body.embed_tokens, nn.Embedding)
        else body.embed_tokens.base_layer.padding_idx,
        layers=tuple(_layer(layer) for layer in layers[: config.num_hidden_layers]),
        norm=_norm(body.norm),
        head=_linear(plain.lm_head),
        rotary=body.rotary_emb,
        saves_activations=not getattr(body, "gradient_checkpointing", False),
    )


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v = (_linear(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    size = attention.head_dim
    window = getattr(attention, "sliding_window", None) or getattr(attention.config, "sliding_window", None)
    shape = Shape(len(q.weight) // size, len(k.weight) // size, size, attention.scaling, window)
    return Layer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=(q, k, v),
        shape=shape,
        output=_linear(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=(_linear(mlp.gate_proj), _linear(mlp.up_proj)),
        down=_linear(mlp.down_proj),
    )


def _norm(norm: Any) -> Norm:
    return Norm(_float(norm.weight), norm.variance_epsilon)


def _linear(module: Any) -> Linear:
    if type(module) is nn.Linear:
        return Linear(_float(module.weight), module.bias)
    base, adapter = _adapted(module, "Linear", nn.Linear)
    if adapter is None:
        return Linear(_float(base.weight), base.bias)
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    if b.bias is not None or type(a) is not nn.Linear:
        raise UnreadableError("its adapter has a bias or layers of its own kind")
    dropout = module.lora_dropout[adapter]
    rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
    if rate and base.weight.requires_grad:
        raise UnreadableError("weights below an adapter with dropout are trained too")
    return Linear(
        _float(base.weight),
        base.bias,
        Adapter(_float(a.weight), _float(b.weight), module.scaling[adapter], rate),
    )


def _embeddings(module: Any) -> Linear:
    if type(module) is nn.Embedding:
        return Linear(_float(module.weight))
    base, adapter = _adapted(module, "Embedding", nn.Embedding)
    if adapter is None:
        return Linear(_float(base.weight))
    a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    return Linear(_float(base.weight), None, Adapter(_float(a), _float(b), module.scaling[adapter], 0.0))


def _adapted(module: Any, kind: str, base: type) -> tuple[Any, str | None]:
    """The layer under PEFT's, and the name of its one active adapter, None where it is switched off."""
    from peft.tuners import lora

    if type(module) is not getattr(lora, kind) or type(module.base_layer) is not base:
        raise UnreadableError(f"{type(module).__name__} is no plain LoRA layer")
    if module.disable_adapters or module.merged:
        return module.base_layer, None
    names = [name for name in module.active_adapters if name in module.scaling]
    if len(names) != 1 or names[0] in module.lora_variant:
        raise UnreadableError("its adapter is a variant of LoRA, or one of several")
    return module.base_layer, names[0]


def _float(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        raise UnreadableError(f"its weights are {tensor.dtype} on {tensor.device.type}")
    return tensor
