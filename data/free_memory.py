"""How much memory may still be taken, of the machine or of the container or job that has less; and giving it back."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that are free or can be freed; a quarter of all where the system does not say, None where it says nothing.

    The limits of control groups (containers, SLURM jobs) count, where they are lower than the machine.
    """
    try:
        found = [1024 * _fields(Path("/proc/meminfo"))["MemAvailable"]]
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError):  # not Linux
        return _quarter_of_all()
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            base, names = GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = base / path.lstrip("/")  # in a container perhaps not there: then the base is the container's own
        for folder in (inner, *inner.parents):
            if folder == base or base in folder.parents:
                found += _free_of_group(folder, *names)
    return min(found)


def _quarter_of_all() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):
        return None


def return_freed_memory() -> None:
    """Give memory back that was freed: glibc keeps the blocks of large pictures for later ones."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _free_of_group(folder: Path, limit: str, used: str, inactive: str) -> list[int]:
    """What a group has left, inactive cache of files not counted as used; nothing for one without a limit."""
    try:
        taken = int((folder / used).read_text()) - _fields(folder / "memory.stat").get(inactive, 0)
        return [max(0, int((folder / limit).read_text()) - taken)]  # "max" for none
    except (OSError, ValueError):
        return []


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    words = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1}
