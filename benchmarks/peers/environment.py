"""A virtual environment for each peer, made once and used again."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from peers.children import run_child

_INSTALL_SECONDS = 3600
# What is worth a line in a result; pip's full list stays beside the environment.
_NOTED = (
    "torch", "transformers", "peft", "accelerate", "trl", "datasets", "llamafactory", "litgpt", "lightning",
    "mlx", "mlx-cpu", "mlx-lm", "numpy", "tokenizers", "safetensors",
)  # fmt: skip


class PeerUnavailable(Exception):
    """A peer cannot be installed; the message is one line."""


def python_of(name: str, folder: Path, requirements: Path) -> Path:
    """The interpreter of a peer's environment in ``folder``, which is made where it is not there or not as asked.

    Raises:
        PeerUnavailable: with pip's last error line and the log's place.
    """
    python = folder / "venv" / "bin" / "python"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    stamp = folder / "installed.json"
    if python.exists() and stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return python
    stamp.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    steps = [
        [sys.executable, "-m", "venv", str(folder / "venv")],
        [*pip, "install", "--progress-bar", "off", "--requirement", str(requirements)],
    ]
    log = folder / "install.log"
    for step in steps:
        done = run_child(step, log, limit_seconds=_INSTALL_SECONDS)
        if done.error:
            raise PeerUnavailable(f"{name} could not be installed: {done.error}; log: {log}")
    _remove_unusable(python, folder)
    stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def _remove_unusable(python: Path, folder: Path) -> None:
    # The compiled parts of these fit one build of torch, and pip may have brought another. Text needs neither, but
    # transformers fails where one is there and cannot be imported.
    for number, name in enumerate(("torchvision", "torchaudio")):
        log = folder / f"import-{number}.log"
        if run_child([str(python), "-c", f"import {name}"], log, limit_seconds=300).error:
            command = [str(python), "-m", "pip", "uninstall", "--yes", name]
            run_child(command, log, limit_seconds=300)


def installed_versions(python: Path) -> dict[str, str]:
    """Versions of the packages that decide a peer's speed."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {entry["name"].lower(): entry["version"] for entry in json.loads(listed)}
    return {name: found[name] for name in _NOTED if name in found}
