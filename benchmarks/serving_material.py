"""What is served and asked: prompts, adapters, copies of them, and adapters that are none."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from serving_server import HERE, ServerFailed, thread_environment
from tokenizers import Tokenizer

PROMPT_TOKENS = 32
ADAPTER_STD = (
    0.05  # of A and B: 16 adapters of the default model then give 16 answers, with 0.02 half of them agree
)
_TEXT = """
the river town old bridge where people trade grain for cloth each spring and a small boat carries letters across
while children count stones birds sing loud before rain falls on green hills under grey morning light my brother
wrote about music numbers history cooking travel science weather markets gardens cities oceans
"""
_WORDS = _TEXT.split()
BAD_KINDS = ("truncated", "noise", "not finite", "wrong shape", "no config", "no JSON", "stranger", "pickle")


def reference(job: Mapping[str, Any], work: Path, threads: int | None = None) -> dict[str, Any]:
    """Run serving_reference.py; ServerFailed with its last line where it fails."""
    asked, told = work / "reference-job.json", work / "reference-result.json"
    asked.write_text(json.dumps({**job, "threads": threads}), encoding="utf-8")
    told.unlink(missing_ok=True)
    path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **thread_environment(threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "serving_reference.py"), str(asked), str(told)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ServerFailed(f"the reference failed: {last[:300]}")
    result: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return result


def prompts(tokenizer: Tokenizer, count: int, seed: int) -> list[tuple[list[int], str]]:
    """Different prompts of PROMPT_TOKENS tokens, as tokens and as a text that is read as these tokens."""
    generator = random.Random(seed)
    found: list[tuple[list[int], str]] = []
    while len(found) < count:
        text = " ".join(generator.choices(_WORDS, k=2 * PROMPT_TOKENS))
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:PROMPT_TOKENS]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if tokenizer.encode(text, add_special_tokens=False).ids == ids:
            found.append((ids, text))
    return found


def make_adapters(
    base: Path, base_name: str, store: Path, count: int, std: float, work: Path
) -> dict[str, Path]:
    """``count`` adapters in ``store``, by name."""
    folders = {f"a{number:02}": store / f"a{number:02}" for number in range(count)}
    job = {"task": "adapters", "base": str(base), "base_name": base_name, "std": std}
    reference({**job, "folders": list(map(str, folders.values()))}, work)
    return folders


def drop(source: Path, root: Path, name: str) -> None:
    """Make ``source`` the adapter ``name`` in ``root``, whole from the first moment; one that is there goes first."""
    made = root.parent / f".{root.name}-{name}"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(source, made)
    take_away(root, name)
    made.rename(root / name)


def take_away(root: Path, name: str) -> None:
    """Take the adapter ``name`` out of ``root`` in one step."""
    if (root / name).exists():
        gone = root.parent / f".{root.name}-{name}-gone"
        shutil.rmtree(gone, ignore_errors=True)
        (root / name).rename(gone)
        shutil.rmtree(gone)


def drop_bad(source: Path, root: Path, name: str, kind: str) -> None:
    """An adapter folder with one fault; ``kind`` is of BAD_KINDS."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if kind == "truncated":
        os.truncate(tensors, tensors.stat().st_size // 2)
    elif kind == "noise":
        tensors.write_bytes(random.Random(name).randbytes(4096))
    elif kind == "no config":
        config.unlink()
    elif kind == "no JSON":
        config.write_text('{"peft_type": "LORA"', encoding="utf-8")
    elif kind == "pickle":
        tensors.rename(folder / "adapter_model.bin")
    else:
        content = load_file(tensors)
        first = sorted(content)[0]
        if kind == "not finite":
            content[first].flat[0] = np.nan
        elif kind == "wrong shape":
            content[first] = content[first][:, :-1].copy()
        elif kind == "stranger":
            content[f"{first}.other"] = content[first]
        else:
            raise ValueError(f"no kind {kind}")
        save_file(content, tensors)


def forget_cached(folder: Path) -> None:
    """Let the system drop what it keeps in memory of a folder's files, so that the next read is of the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(number)


def adapter_bytes(folders: Sequence[Path]) -> int:
    """Bytes of the adapters' tensors on disk."""
    return sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
