"""Base model and tokenizer from a hub id, a local folder, a URL or a catalog name.

Everything becomes a local folder first, so that all that follows has one way to read it.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.checkpoints.fetching import fetch_model
from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.catalog import CATALOG, cache_dir, catalog_folder
from tunesmith.paths import expanded
from tunesmith.storage.urls import is_url

Precision = Literal["auto", "fp32", "bf16"]
_NO_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


@dataclass(frozen=True)
class BaseFolder:
    """A base model on disk. ``revision`` is the hub's commit, None for local folders."""

    model_id: str
    path: Path
    revision: str | None

    @property
    def weight_files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))


def find_base(
    model_id: str, *, weights: bool = True, say: Callable[[str], None] = lambda _: None
) -> BaseFolder:
    """Bring a base model onto this machine.

    Args:
        model_id: catalog name, local folder, hub id, or URL of a model, checkpoint or run.
        weights: False fetches configuration and tokenizer only.
        say: told what is being fetched.

    Raises:
        ModelError: it cannot be found, fetched, or is no Hugging Face folder.
    """
    if not model_id.strip():
        raise ModelError("model", "its name is empty", "name a catalog model, a folder or a hub id")
    if model_id in CATALOG:
        return BaseFolder(model_id, catalog_folder(model_id, say), None)
    if is_url(model_id):
        return _checked(fetch_from_url(model_id, weights=weights, say=say), weights)
    local = expanded(model_id)
    if local.is_dir():
        return _checked(BaseFolder(model_id, local, None), weights)
    if local.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
        raise ModelError(model_id, "no such model folder", "check model_id")
    near = difflib.get_close_matches(model_id, CATALOG, 1)
    if near:
        raise ModelError(model_id, "no such model", f"closest catalog name is {near[0]}")
    say(f"Looking for {model_id} in the local cache and on the Hugging Face hub")
    patterns = [*_NO_WEIGHTS, *(["*.safetensors"] if weights else [])]
    return _checked(fetch_from_hub(model_id, patterns), weights)


def fetch_from_url(
    url: str, *, weights: bool = True, say: Callable[[str], None] = lambda _: None
) -> BaseFolder:
    """A model, checkpoint or run at a URL, see ``fetch_model``; kept in the cache.

    Raises:
        ModelError: it cannot be had.
    """
    return BaseFolder(
        url, fetch_model(url, cache_dir() / "remote", ModelError, weights=weights, say=say), None
    )


def fetch_from_hub(model_id: str, patterns: list[str]) -> BaseFolder:
    """Files of a hub repository, from the local cache or the network.

    Raises:
        ModelError: neither has it.
    """
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(model_id, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a score of unrelated types for one fact
        reason = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
        raise ModelError(
            model_id,
            f"is neither a catalog name ({', '.join(CATALOG)}) nor a local folder, and the Hugging Face hub "
            f"could not give it ({reason[:160]})",
            "set model_id to a local folder with config.json, tokenizer.json and *.safetensors",
        ) from error
    return BaseFolder(model_id, path, path.name)


def _checked(base: BaseFolder, weights: bool) -> BaseFolder:
    if not (base.path / "config.json").is_file():
        raise ModelError(base.model_id, "has no config.json", "name a Hugging Face model folder")
    if weights and not base.weight_files:
        raise ModelError(base.model_id, "has no *.safetensors weights", "convert the weights to safetensors")
    return base


def load_tokenizer(base: BaseFolder, chat_template: str | None = None) -> Any:
    """The tokenizer; ``chat_template`` replaces its own.

    Raises:
        ModelError: the folder has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((base.path / name).is_file() for name in names):
        raise ModelError(
            base.model_id, "has no tokenizer", "copy tokenizer.json of the model into the folder"
        )
    with _as_model_error(base.model_id, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    if tokenizer.eos_token_id is None:
        raise ModelError(base.model_id, "its tokenizer has no end-of-sequence token", "set eos_token in it")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def model_limit(base: BaseFolder) -> int | None:
    """The longest context the base was made for, in tokens, as its config.json says."""
    with _as_model_error(base.model_id, "config.json"):
        config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    return int(limit) if limit else None


def load_model(
    base: BaseFolder, *, dtype: torch.dtype, device: torch.device, context_length: int | None
) -> Any:
    """The causal LM, weights mapped from safetensors.

    Args:
        base: folder with weights.
        dtype: of the weights in memory.
        device: where they go.
        context_length: longer than the model was made for: linear RoPE interpolation by the ratio (Chen et
            al. 2023, arXiv:2306.15595). None: the model's own.

    Raises:
        ModelError: the folder cannot be loaded as a causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what matters in its reports is checked below
    with _as_model_error(base.model_id, "model"):
        config = AutoConfig.from_pretrained(base.path)
        limit = model_limit(base)
    if context_length and limit and context_length > limit:
        config.rope_parameters = _interpolated(config, context_length / limit, base.model_id)
        config.max_position_embeddings = context_length
    with _as_model_error(base.model_id, "model"):
        model, found = AutoModelForCausalLM.from_pretrained(
            base.path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if found["missing_keys"]:  # transformers would go on with random numbers in their place
        name = min(found["missing_keys"])
        raise ModelError(
            base.model_id, f"its *.safetensors lack {name}", "copy every weight file of the model"
        )
    return model.to(device)


def _interpolated(config: Any, ratio: float, place: str) -> dict[str, Any]:
    """RoPE settings with positions divided by ``ratio``, on top of an earlier linear interpolation."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind not in ("default", "linear"):
        has = f"{kind} position scaling" if kind else "no plain RoPE positions"
        raise ModelError(
            place, f"has {has}, so its context cannot be extended linearly", "lower context_length"
        )
    return {**rope, "rope_type": "linear", "factor": float(rope.get("factor") or 1.0) * ratio}


@contextmanager
def _as_model_error(place: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # foreign files, and libraries with exceptions of a kind of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(place, f"its {what} cannot be loaded ({reason})", "check the folder") from error


def choose_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(precision: Precision, device: torch.device) -> tuple[torch.dtype, str]:
    """Compute dtype and the reason for it, for people.

    bfloat16 without hardware for it is emulated, 40 to 500 times slower than float32.

    Raises:
        ConfigError: never for ``auto``.
    """
    if precision == "fp32":
        return torch.float32, "float32, as asked"
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    if precision == "bf16":
        if not fast:
            raise ConfigError(
                "setting precision",
                f"bf16 is emulated on this {device.type}, 40 to 500 times slower than fp32",
                "set precision to auto or fp32",
            )  # fmt: skip
        return torch.bfloat16, "bfloat16, as asked"
    return (
        (torch.bfloat16, "bfloat16: fast here") if fast else (torch.float32, "float32: no fast bfloat16 here")
    )


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags
