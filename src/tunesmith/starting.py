"""Starting without Python's search for cycles."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def search_paused() -> Iterator[None]:
    """For imports and loading, which make objects by the hundred thousand that all stay.

    Python would look through them for cycles again and again, a fifth of the time that torch and transformers take to
    be imported. What has been made meanwhile is not looked through later either.
    """
    if not gc.isenabled():  # a caller has paused it
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
