"""What replicas do, told by a file of each, which it writes anew every second.

A replica whose places are all taken takes no further call of Ray Serve's: it could not be asked when it matters most.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from tunesmith.serving.seam import AdapterKey, EngineFacts

_PERIOD = 1.0  # seconds
_STALE_SECONDS = 5.0  # without a word, a replica has ended or is stuck


def start_telling(folder: Path, tell: Callable[[], EngineFacts]) -> threading.Thread:
    """Write what ``tell`` says into ``folder``, in a thread that ends when the folder has gone."""
    thread = threading.Thread(target=_keep_telling, args=(folder, tell), name="facts", daemon=True)
    thread.start()
    return thread


def read_facts(folder: Path) -> dict[str, EngineFacts]:
    """The last word of each replica by the number of its process; of one that is silent, nothing."""
    found: dict[str, EngineFacts] = {}
    for file in folder.glob("*.json"):
        with suppress(OSError, ValueError, TypeError):  # gone at this moment, or no file of ours
            if time.time() - file.stat().st_mtime < _STALE_SECONDS:
                values = json.loads(file.read_bytes())
                loaded = tuple(AdapterKey(str(key)) for key in values.pop("loaded"))
                found[file.stem] = EngineFacts(loaded=loaded, **values)
            else:
                file.unlink()
    return found


def _keep_telling(folder: Path, tell: Callable[[], EngineFacts]) -> None:
    file, new = folder / f"{os.getpid()}.json", folder / f"{os.getpid()}.new"
    with suppress(FileNotFoundError):
        while True:
            new.write_text(json.dumps(asdict(tell())))
            new.rename(file)  # a reader finds the old or the new, never a part
            time.sleep(_PERIOD)
