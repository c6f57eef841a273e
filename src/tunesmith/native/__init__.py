"""Functions compiled from the C beside this, where a C compiler was at hand when tunesmith was installed.

Each file is compiled once for each level of processor (``setup.py``); the level that torch found this processor to have
is loaded. Where none could be compiled, or its threads are not those of torch, the callers compute the same by torch.
Threads are torch's own: the libraries have no OpenMP of their own and find the one that torch has loaded.
"""

import ctypes
import hashlib
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_LEVELS = {"AVX512": "x86_64_v4", "AVX2": "x86_64_v3"}
_KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_long, "x": ctypes.c_double}


@cache
def _library(name: str) -> ctypes.CDLL | None:
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), "any")
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    for candidate in (level, "any"):
        path = Path(__file__).parent / f"{name}_{candidate}{suffix}"
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


@cache
def _function(library: str, name: str, kinds: str) -> Callable[..., Any] | None:
    found = _library(library)
    if found is None:
        return None
    function = getattr(found, name)
    function.argtypes = [_KINDS[kind] for kind in kinds] + [ctypes.c_long]
    function.restype = None
    return lambda *given: function(
        *(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given),
        torch.get_num_threads(),
    )


def compiled(
    library: str, name: str, kinds: str, like: torch.Tensor | None = None
) -> Callable[..., Any] | None:
    """A compiled function for the type of ``like``; None where it has none: compute by torch then.

    Args:
        like: None: a function that is the same for every type.
        kinds: of the arguments, one letter each: p a tensor, n a whole number, x another; threads are added. The
            function reads and writes the tensors' memory as it is: pass strides where they are not contiguous.
    """
    if like is None:
        return _function(library, name, kinds)
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return None
    return _function(library, f"{name}_{'float' if like.dtype == torch.float32 else 'double'}", kinds)


def identity(library: str) -> str:
    """Level and content of what was compiled, or "torch": another compiler may give a sum other last bits."""
    found = _library(library)
    if found is None:
        return "torch"
    path = Path(found._name)
    level = path.name.partition(".")[0].removeprefix(f"{library}_")
    return f"C, {level}, {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def is_compiled(library: str) -> bool:
    """Whether ``library`` was compiled for this machine."""
    return _library(library) is not None
