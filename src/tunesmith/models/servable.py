"""A model ready to answer: a base, or a base with an adapter, from a name or a checkpoint folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.checkpoints.locate import locate_model
from tunesmith.checkpoints.manifest import MANIFEST_NAME, Manifest, fingerprint_weights, verify
from tunesmith.checkpoints.signature import refuse_unsigned
from tunesmith.data.rendering import Renderer
from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.base import (
    BaseFolder,
    Precision,
    choose_device,
    choose_dtype,
    find_base,
    load_model,
    load_tokenizer,
)
from tunesmith.models.lora import continue_adapter
from tunesmith.models.stops import Stops, find_stops

_UNLIMITED = 2**31  # for models whose positions have no end


@dataclass(frozen=True)
class Servable:
    """A loaded model with everything that turns chats into tokens and tokens into answers."""

    name: str
    model: Any
    tokenizer: Any
    renderer: Renderer
    stops: Stops
    manifest: Manifest | None  # None for a base model, and for checkpoints of other tools
    folder: Path
    is_adapter: bool

    @property
    def context_length(self) -> int:
        """Most tokens the model reads."""
        config = self.model.config
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(limit) if limit else _UNLIMITED


def load_servable(
    reference: str, output_dirs: Sequence[Path], *, base: str | None = None, precision: Precision = "auto"
) -> Servable:
    """Load what ``reference`` names.

    Args:
        reference: a run, tag or checkpoint folder; else a base model's catalog name, folder or hub id.
        output_dirs: where runs and tags are looked for.
        base: where an adapter's base is, if its own record of it does not lead there.
        precision: of the weights in memory.

    Raises:
        ConfigError: ``base`` is given for what is no adapter.
        ModelError: it cannot be found, is damaged, or is an adapter of another base.
        CheckpointError: a file is not the one that was saved.
    """
    folder = locate_model(reference, output_dirs)
    is_adapter = folder is not None and (folder / "adapter_config.json").is_file()
    if base is not None and not is_adapter:
        raise ConfigError("--base", f"has no effect: {reference} is no adapter", "leave it out")
    if folder is None:
        return _load(reference, find_base(reference), None, None, precision)
    manifest = verified_manifest(folder)
    if not is_adapter:
        return _load(reference, BaseFolder(reference, folder, None), None, manifest, precision)
    source = base or (manifest.base.source if manifest else _recorded_base(folder))
    try:
        found = find_base(source)
    except ModelError as error:
        if base is not None:
            raise
        fault = f"its base cannot be used ({error})"
        raise ModelError(reference, fault, "say where that base is with --base") from error
    if manifest is not None:
        check_base(reference, manifest, found)
    return _load(reference, found, folder, manifest, precision)


def verified_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint, every file of which is as it was saved; None for those of other tools.

    Raises:
        CheckpointError: naming a file that is missing or changed, or the folder where it is not signed by the
            configured key.
    """
    if not (folder / MANIFEST_NAME).is_file():
        refuse_unsigned(folder, f"no {MANIFEST_NAME} in it")
        return None
    return verify(folder)


def _load(
    name: str, base: BaseFolder, adapter: Path | None, manifest: Manifest | None, precision: Precision
) -> Servable:
    device = choose_device()
    dtype, _ = choose_dtype(precision, device)
    # The checkpoint's own tokenizer and template: what was trained is what is used.
    tokenizer = load_tokenizer(BaseFolder(name, adapter, None) if adapter else base)
    context_length = manifest.config.get("context_length") if manifest else None
    model = load_model(base, dtype=dtype, device=device, context_length=context_length)
    settings = model.generation_config
    if adapter is not None:
        model = continue_adapter(model, adapter, trainable=False)
        settings = _generation_config(adapter) or settings
    model.eval()
    model.requires_grad_(False)
    renderer = Renderer(tokenizer)
    stops = find_stops(tokenizer, settings, renderer.end_of_turn, ())
    return Servable(
        name, model, tokenizer, renderer, stops, manifest, adapter or base.path, adapter is not None
    )


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def _recorded_base(folder: Path) -> str:
    from peft import PeftConfig

    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise ModelError(str(folder), "does not say which base it belongs to", "name it with --base")
    return str(name)


def check_base(reference: str, manifest: Manifest, base: BaseFolder) -> None:
    """Raise ModelError unless ``base`` holds the very weights that an adapter was trained on."""
    _, fingerprint = fingerprint_weights(base.weight_files)
    if fingerprint != manifest.base.fingerprint:
        raise ModelError(
            reference,
            f"was trained on other weights of {manifest.base.source} than those in {base.path}",
            "give the base it was trained on",
        )
