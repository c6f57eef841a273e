"""The files of a LoRA adapter, read with the same care for every engine: nothing is believed before it is checked.

Refused, naming the reason: what is damaged or of another base; tensors without a place, places without a tensor,
shapes, dtypes and numbers that cannot be. A setting of PEFT's that an engine does not name counts as one that it
would compute differently.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.models.servable import check_base, verified_manifest

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before every module's name
MOST_RANK = 4096
ANOTHER = "use another checkpoint"
_MOST_CONFIG_BYTES = 1 << 20
_MOST_HEADER_BYTES = 16 << 20
_DTYPES = ("F32", "F16", "BF16", "F64")
# Fields of LoraConfig that every engine computes, or that have no part in what a trained adapter computes.
UNDERSTOOD = frozenset({
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "task_type",
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "megatron_core",
})  # fmt: skip
# These move a part of the base's weights into the adapter, so that the base is no longer the one that is served.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class NotServed(ModelError):
    """A base or adapter of a kind that an engine does not compute; another one may."""


def unserved(path: Path, fault: str, who: str) -> NotServed:
    """``who``: as in "the CPU engine does not serve"."""
    return NotServed(str(path), f"{fault}, which {who}", "merge it, or use another engine")


def unreadable(path: Path, error: Exception) -> ModelError:
    """``path`` is damaged, in the words of a library."""
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return ModelError(str(path), f"cannot be read ({reason})", ANOTHER)


def check_manifest(folder: Path, base: BaseFolder, fingerprint: str, context_length: int | None) -> None:
    """The checkpoint, where it is one of ours, is whole and of the base that is served.

    Args:
        folder: the adapter's.
        base: the base's files.
        fingerprint: of these files when they were loaded.
        context_length: positions that the base was made for; None: it has no end of them.

    Raises:
        CheckpointError: a file is not the one that was saved.
        ModelError: it was trained on other weights, or on stretched positions.
    """
    manifest = verified_manifest(folder)
    if manifest is None:
        return
    if manifest.base.fingerprint != fingerprint:
        check_base(str(folder), manifest, base)  # says so; returns only if the files have changed since
        raise ModelError(
            str(folder), "its base has changed on disk since it was loaded", "start the server anew"
        )
    trained = manifest.config.get("context_length")
    if isinstance(trained, int) and context_length is not None and trained > context_length:
        fault = f"was trained with positions stretched to {trained} tokens"
        raise ModelError(str(folder), fault, "the CPU engine serves the base's own positions")


def read_config(folder: Path, understood: Collection[str], who: str) -> Any:
    """PEFT's settings, a ``LoraConfig`` of which every field is in ``understood`` or as PEFT has it by default.

    Raises:
        NotServed: a setting is not; with ``who`` as in ``unserved``.
        ModelError: it cannot be read, or is of no LoRA adapter.
    """
    from peft import LoraConfig

    path = folder / CONFIG
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise ValueError(f"more than {_MOST_CONFIG_BYTES} bytes")
        given = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError("no table")
        if given.get("peft_type") != "LORA":
            raise ValueError(f"its peft_type is {str(given.get('peft_type'))[:40]}, not of a LoRA adapter")
    except FileNotFoundError as error:
        raise ModelError(str(folder), f"holds no adapter (no {CONFIG})", "name a LoRA checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    known = {field.name for field in fields(LoraConfig)}
    if strangers := sorted(name for name in given.keys() - known if given[name] not in (None, False)):
        raise unserved(path, f"{strangers[0]} is unknown to this PEFT", who)
    try:
        config, plain = LoraConfig(**{k: v for k, v in given.items() if k in known}), LoraConfig()
    except (TypeError, ValueError, AttributeError, KeyError, ImportError) as error:  # from PEFT's own checks
        raise unreadable(path, error) from error
    for name in sorted(given.keys() & known - set(understood)):
        if getattr(config, name) != getattr(plain, name):
            raise unserved(path, f"has {name} {str(given[name])[:60]}", who)
    start = str(config.init_lora_weights).lower()
    if start.startswith(_MOVES_BASE):
        raise unserved(path, f"was begun by {start}, which changes the base's weights", who)
    return config


def read_tensors(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, torch.Tensor], bytes]:
    """The tensors of a safetensors file and its SHA-256; their names and shapes are exactly those ``wanted``.

    All that can be known from the header is checked before memory is taken.

    Raises:
        ModelError: the file is missing or damaged, or holds something else.
    """
    check_header(path, wanted)
    try:
        content = path.read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(path, error) from error
    check_shapes(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted)
    return tensors, hashlib.sha256(content).digest()


def check_header(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """See ``read_tensors``."""
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MOST_HEADER_BYTES:
            raise ValueError(f"its header has {header} bytes")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except FileNotFoundError as error:
        raise ModelError(
            str(path.parent), f"has no {TENSORS}", "convert the adapter to safetensors"
        ) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(path, error) from error
    for name, dtype in sorted(dtypes.items()):
        if dtype not in _DTYPES:
            raise ModelError(
                str(path), f"{name[:120]} is {dtype}", f"the types served are {', '.join(_DTYPES)}"
            )
    check_shapes(path, shapes, wanted)


def check_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """See ``read_tensors``."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise ModelError(str(path), f"the adapter lacks {missing[0]}", "it is damaged or of another base")
    if strangers := sorted(found.keys() - wanted.keys()):
        fault = f"{strangers[0][:120]} has no place in this base"
        raise ModelError(
            str(path), fault, "use the adapter's own base, or save it without copies of the base's layers"
        )
    for name, shape in sorted(wanted.items()):
        if found[name] != shape:
            fault = f"{name} has shape {found[name]}, this base wants {shape}"
            raise ModelError(str(path), fault, "use the adapter's own base")


def check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise ModelError where a number of ``tensor`` is infinite or none."""
    low, high = tensor.aminmax()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ModelError(str(path), f"{name} has numbers that are not finite", ANOTHER)
