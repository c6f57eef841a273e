"""How much memory a model takes once it is loaded, told from its files before anything of them is read in.

Counted are weights in float32, of which less stays where fewer bits give the same numbers (``product.py``), and the
keys and values of as many tokens as may run at once. While a base is being read, its file's pages in the system's
cache and one layer's copies come on top.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder

_FLOAT32 = 4
_HEAD, _EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True)
class Measure:
    """Sizes of a base, as the engine's settings make them.

    Attributes:
        running: most requests at work at once, ``waiting``: that wait beside them.
        context_length: most tokens of one.
        prefix_tokens: kept of past prompts.
    """

    running: int
    waiting: int
    context_length: int
    prefix_tokens: int

    def context(self, base: BaseFolder) -> int:
        """The longest request the base serves, in tokens; ModelError as ``base_bytes``."""
        limit = _config(base).get("max_position_embeddings")
        if isinstance(limit, int) and limit > 0:
            return min(limit, self.context_length)
        return self.context_length  # the engine will refuse any other limit by name

    def base_bytes(self, base: BaseFolder) -> int:
        """Bytes of a loaded base: weights, and the KV cache when all of it is in use.

        Raises:
            ModelError: its files cannot be read.
        """
        try:
            shapes = dict(item for file in base.weight_files for item in _shapes(file))
        except (OSError, SafetensorError, ValueError) as error:
            raise ModelError(
                base.model_id, f"its weights cannot be read ({error})", "copy its files again"
            ) from error
        elements = sum(map(prod, shapes.values()))
        if _HEAD not in shapes:  # the embeddings are the head too, laid out once more for its product
            elements += max((prod(s) for name, s in shapes.items() if name.endswith(_EMBEDDINGS)), default=0)
        tokens = self.running * self.context(base) + self.prefix_tokens
        return _FLOAT32 * (elements + tokens * _token_elements(base))


def adapter_bytes(folder: Path) -> int:
    """Bytes of a loaded adapter's tensors; the file's size where it cannot be read, as it will be refused."""
    file = folder / "adapter_model.safetensors"
    try:
        return _FLOAT32 * sum(prod(shape) for _, shape in _shapes(file))
    except (OSError, SafetensorError, ValueError):
        return file.stat().st_size if file.is_file() else 0


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no dict
            yield name, tuple(tensors.get_slice(name).get_shape())


def _token_elements(base: BaseFolder) -> int:
    """Numbers that one token has in the KV cache."""
    config = _config(base)
    try:
        heads = int(config["num_attention_heads"])
        groups = int(config.get("num_key_value_heads") or heads)
        size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        numbers = (int(config["num_hidden_layers"]), groups, size)
        return 2 * prod(numbers) if min(numbers) > 0 else 0
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        return 0  # of a kind that the engine will refuse by name


def _config(base: BaseFolder) -> dict[str, Any]:
    try:
        config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            base.model_id, f"its config.json cannot be read ({reason})", "check the folder"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(base.model_id, "its config.json is no object", "check the folder")
    text = config.get("text_config")
    return text if isinstance(text, dict) else config
