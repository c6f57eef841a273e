"""The memory this process has, and what it could have."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    except OSError:
        return 0


def give_back_memory() -> None:
    """What this process has freed goes back to the system, where the allocator would keep it (glibc).

    It stays in pieces that fit nothing of what follows: the peak of a run was 0.1 GB higher for it.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(system: Path = Path("/")) -> int | None:
    """Memory that can be had without swapping, a container's limit included; None where the system does not tell."""
    found = []
    with suppress(OSError):
        known = _numbers(system / "proc/meminfo")
        found.append(known["MemAvailable"] * 1024)
    with suppress(OSError):
        group = system / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            # Cached files count as used, and make way when memory is asked for; files in memory, as in /dev/shm, are
            # counted with them and do not.
            known = _numbers(group / "memory.stat")
            cached = known["file"] - known.get("shmem", 0)
            found.append(max(0, int(limit) - used + cached))
    return min(found, default=None)


def _numbers(file: Path) -> dict[str, int]:
    """The ``name: number`` lines of a file of the kernel."""
    lines = [line.replace(":", " ").split() for line in file.read_text(encoding="ascii").splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
