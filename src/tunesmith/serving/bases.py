"""Which bases a server has, and which of them an adapter belongs to."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tunesmith.checkpoints.locate import locate_model
from tunesmith.checkpoints.manifest import (
    MANIFEST_NAME,
    Manifest,
    identified,
    read_manifest,
    verify_sizes,
)
from tunesmith.checkpoints.naming import short_model_name
from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.base import BaseFolder, find_base
from tunesmith.serving.footprint import Measure
from tunesmith.serving.memory import Base
from tunesmith.serving.protocol import MAX_NAME, NAME

_ADAPTER_CONFIG = "adapter_config.json"
_MOST_CONFIG_BYTES = 1 << 20


def given_bases(
    references: Sequence[str], output_dirs: Sequence[Path], measure: Measure, say: Callable[[str], None]
) -> list[Base]:
    """The bases that the command line names.

    Args:
        references: catalog names, folders, hub ids; runs, checkpoints and tags of full-parameter training.
        output_dirs: where runs and tags are looked for.
        measure: of their memory.
        say: told what is being fetched.

    Raises:
        ModelError: one cannot be found, or is an adapter.
        CheckpointError: one is a checkpoint that is damaged or not signed.
        ConfigError: two go by one name, or one by none that a request could give.
    """
    bases = [given_base(reference, output_dirs, measure, say) for reference in references]
    for number, base in enumerate(bases):
        if any(base.name == other.name for other in bases[:number]):
            raise ConfigError("--base", f"two are called {base.name}", "name each once, or rename a folder")
    return bases


def given_base(
    reference: str, output_dirs: Sequence[Path], measure: Measure, say: Callable[[str], None]
) -> Base:
    """One of ``given_bases``; a checkpoint of ours goes by its tag, anything else by its short name."""
    folder = locate_model(reference, output_dirs)
    if folder is not None and (folder / MANIFEST_NAME).is_file():
        base = checkpoint_base("", folder, measure)
        base.name, base.is_given = _full_checkpoint(folder).tag, True
    elif folder is not None and (folder / _ADAPTER_CONFIG).is_file():
        raise _is_adapter(reference)
    else:
        found = find_base(reference, say=say)
        base = Base(
            short_model_name(found.model_id), measure.base_bytes(found), found, measure.context(found)
        )
    if not re.fullmatch(NAME.strip("^$"), base.name) or len(base.name) > MAX_NAME:
        raise ConfigError(
            "--base", f"{base.name} is no model name", "rename the folder: a letter or digit first"
        )
    return base


def checkpoint_base(name: str, folder: Path, measure: Measure) -> Base:
    """A full-parameter checkpoint as a base. Its contents are verified when it is loaded, not here.

    Raises:
        ModelError: it is no such checkpoint, or its files cannot be read.
        CheckpointError: a file is missing or of other size, or it is not signed by the configured key.
    """
    manifest = _full_checkpoint(folder)
    verify_sizes(folder, manifest)
    found = BaseFolder(name or str(folder), folder, None)
    weights = {file.name: manifest.files[file.name].sha256 for file in found.weight_files}
    return Base(
        name,
        measure.base_bytes(found),
        found,
        measure.context(found),
        recorded=_fingerprint(weights),
        is_given=False,
    )


def _fingerprint(digests: Mapping[str, str]) -> str:
    """As ``fingerprint_weights`` has it, from the digests that the manifest lists."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _full_checkpoint(folder: Path) -> Manifest:
    manifest, _ = identified(folder)
    if manifest.method != "full":
        raise _is_adapter(str(folder))
    return manifest


def _is_adapter(reference: str) -> ModelError:
    return ModelError(reference, "is an adapter, no base", "name its base, and its folder as loading path")


def base_of(folder: Path, name: str, given: Sequence[Base], others: Callable[[], Sequence[Base]]) -> Base:
    """The base that the adapter in ``folder`` belongs to: the one whose fingerprint its manifest has.

    Without a manifest the name says it, or ``base_model_name_or_path``, or there is but one to choose. Where there is
    but one, whether it fits is left to the engine, which knows what it has loaded.

    Args:
        folder: of the adapter.
        name: of the folder in the loading path; begins with ``{base}:`` where the base is told by name.
        given: bases of the command line.
        others: tells the checkpoints of the loading path.

    Raises:
        ModelError: it belongs to none of these.
        CheckpointError: its manifest cannot be read.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return _by_name(folder, name, given, others)
    bases = [*given, *others()]
    if len(bases) == 1:
        return bases[0]
    wanted = read_manifest(folder).base
    fits = [base for base in bases if base.fingerprint == wanted.fingerprint]
    if not fits:
        fault = f"was trained on other weights of {wanted.source} than those of {_names(bases)}"
        raise ModelError(str(folder), fault, "serve the base it was trained on")
    return _named(name, fits) or fits[0]


def _by_name(folder: Path, name: str, given: Sequence[Base], others: Callable[[], Sequence[Base]]) -> Base:
    # A checkpoint's tag begins with its own base's name: the longest one is meant.
    named = _named(name, [*given, *others()]) if ":" in name else None
    if named is not None:
        return named
    if len(given) == 1:
        return given[0]
    recorded = _recorded(folder)
    fits = [base for base in given if recorded in (base.folder.model_id, base.name, str(base.folder.path))]
    if len(fits) != 1:
        fault = f"does not say to which of {_names(given)} it belongs"
        raise ModelError(str(folder), fault, f"call its folder {given[0].name}:{folder.name} or the like")
    return fits[0]


def _named(name: str, bases: Sequence[Base]) -> Base | None:
    fits = [base for base in bases if name.startswith(f"{base.name}:")]
    return max(fits, key=lambda base: len(base.name), default=None)


def _recorded(folder: Path) -> str | None:
    """The base that PEFT's settings name."""
    path = folder / _ADAPTER_CONFIG
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if path.stat().st_size <= _MOST_CONFIG_BYTES:
            name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
            return name if isinstance(name, str) else None
    return None


def _names(bases: Sequence[Base]) -> str:
    return ", ".join(base.name for base in bases[:5]) + (", ..." if len(bases) > 5 else "")
