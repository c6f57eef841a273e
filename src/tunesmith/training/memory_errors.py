"""Running out of memory, told as what it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tunesmith.errors import RunError

_CPU_MESSAGE = "can't allocate memory"  # torch has a type of its own for GPUs only


@contextmanager
def memory_errors(remedy: str = "lower context_length, or take a smaller model") -> Iterator[None]:
    """Raise RunError, with this remedy, in place of what Python and torch raise when memory is used up."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_gpu = isinstance(error, torch.OutOfMemoryError)
        if not (is_gpu or isinstance(error, MemoryError) or _CPU_MESSAGE in str(error)):
            raise
        raise RunError(
            "GPU" if is_gpu else "this machine",
            "its memory does not suffice for this run",
            remedy,
        ) from error
