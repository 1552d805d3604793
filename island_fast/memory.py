"""How much memory this process can still take, and refusing what would take more.

What others wrote, such as an object of a repository, can claim any size. Whatever would take much memory asks
`require_memory` first, so that a claim ends with a sentence, not with a host that runs out of memory.
"""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

from island_fast.errors import MemoryBudgetError

__all__ = ["available_memory", "require_memory"]

_SMALL = 32 << 20  # bytes; what takes less is not asked for
_SHARE = 2  # one thing may take half of what is available: others are in memory at the same time
_MIB = 1 << 20


def require_memory(what: str, size: int) -> None:
    """Raise MemoryBudgetError if `what`, which takes `size` bytes, is more than half of what is available."""
    if size <= _SMALL:
        return
    budget = available_memory() // _SHARE
    if size > budget:
        raise MemoryBudgetError(
            f"{what} would take {-(-size // _MIB)} MiB of memory, and this host has {budget // _MIB} MiB for "
            "it; if you trust who wrote it, use a host with more memory"
        )


def available_memory() -> int:
    """Return how many bytes this process can still take.

    That is MemAvailable of /proc/meminfo, or less if limits of the process or of its control group (version
    2) leave less. A file that cannot be read limits nothing.
    """
    left = [_read_field("/proc/meminfo", "MemAvailable:")]
    for limit, field in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            left.append(most - (_read_field("/proc/self/status", field) or 0))
    left.append(_memory_left_in_group())
    return max(0, min((one for one in left if one is not None), default=1 << 62))


def _read_field(path: str, field: str) -> int | None:
    """Return the bytes that a file of /proc states in kB; None if it does not."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(path).read_text(errors="replace").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) << 10
    return None


def _memory_left_in_group() -> int | None:
    """Return what the control group and those above it leave; None if nothing limits them."""
    left = None
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text(errors="replace").splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
        group = Path("/sys/fs/cgroup", path.lstrip("/"))
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                most = int((folder / "memory.max").read_text())
                here = most - int((folder / "memory.current").read_text())
                left = here if left is None else min(left, here)
    return left
