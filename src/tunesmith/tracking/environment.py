"""What a run ran on: versions and machine, for the record."""

import os
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("tunesmith", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def machine() -> dict[str, Any]:
    """Processor, cores, memory in bytes, threads and GPU; no host or user name."""
    import psutil
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def seconds_since_process_start() -> float:
    """Age of this process, in seconds: what a user has waited since giving the command."""
    import time

    import psutil

    return time.time() - float(psutil.Process().create_time())


def _processor() -> str:
    with suppress(OSError):  # Linux only; elsewhere Python's own word has to do
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
