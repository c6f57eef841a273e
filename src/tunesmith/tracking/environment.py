"""What a run ran on: versions and machine, for the record."""

import os
import platform
import re
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("tunesmith", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")

# Environment variables by which these libraries take other instructions.
_SETTINGS = (
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OPENBLAS_CORETYPE",
)  # fmt: skip


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
        "blas": arithmetic(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def arithmetic() -> str:
    """The libraries that compute matrix products, the instructions they use here, and what was set for them."""
    import torch

    told = torch.__config__.show()
    library = re.search(r"BLAS_INFO=(\w+)", told)
    found = re.findall(r"(Kernel Library Version [\w.]+|MKL-DNN v[\w.]+|OpenBLAS [\w.]+)", told)
    given = [f"{name}={os.environ[name]}" for name in _SETTINGS if os.environ.get(name)]
    instructions = torch.backends.cpu.get_cpu_capability()
    return ", ".join([library[1] if library else "unknown BLAS", *found, instructions, *given])


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
