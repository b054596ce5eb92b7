"""Read the limits on CPU time and memory that Linux control groups (versions 1 and 2) set for this process.

Sources: the kernel's cgroup-v2.rst ("CPU", "Memory"), cgroup-v1/memory.rst and scheduler/sched-bwc.rst. CPU sets are
not read here: os.sched_getaffinity respects them.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipeline.files import contents

UNLIMITED_BYTES = 2**60
"""Version 1 writes "no limit" as about 2**63 bytes, rounded to whole pages."""


class Limits(NamedTuple):
    """The tightest limits over all groups of the process; None where no group sets one."""

    cores: float | None
    """CPU time, in cores."""
    memory_bytes: int | None
    free_bytes: int | None
    """The part of the limit that is unused, or holds cached files that the kernel can drop."""


def limits(root: Path = Path("/")) -> Limits:
    """Read the limits of the process's group and all its parents. `root` contains `proc` and `sys`."""
    cores = [cores for folder in _groups(root, "cpu") if (cores := _cores(folder))]
    memory = [memory for folder in _groups(root, "memory") if (memory := _memory(folder))]
    return Limits(
        min(cores, default=None),
        min((limit for limit, _ in memory), default=None),
        min((free for _, free in memory), default=None),
    )


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's groups for `controller`, and of their parents. Some may not exist.

    A container sees its own group as the mount's root, whatever path /proc names, so that folder is always included.
    """
    mount = root / "sys/fs/cgroup"
    for line in contents(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # a group of another namespace
            continue
        if not controllers:  # version 2
            yield from (mount / part for part in (group, *group.parents))
        elif controller in controllers.split(","):
            yield from (mount / controller / part for part in (group, *group.parents))
    yield from (mount, mount / controller)


def _cores(folder: Path) -> float | None:
    quota_and_period = contents(folder / "cpu.max").split() or [
        contents(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")
    ]
    if all(text.isdecimal() and int(text) for text in quota_and_period):
        quota, period = map(int, quota_and_period)
        return quota / period
    return None  # "max" or -1: no limit


def _memory(folder: Path) -> tuple[int, int] | None:
    """A group's limit and the free part of it, in bytes; None without a limit."""
    limit = contents(folder / "memory.max") or contents(folder / "memory.limit_in_bytes")
    if not limit.isdecimal() or int(limit) >= UNLIMITED_BYTES:
        return None
    used = contents(folder / "memory.current") or contents(folder / "memory.usage_in_bytes")
    if not used.isdecimal():
        return int(limit), int(limit)
    # Usage includes cached files, so that a data set just read would seem to fill the memory. Version 1 lists the
    # group's own pages, and with the prefix `total_` also those of its children.
    cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", contents(folder / "memory.stat"), re.MULTILINE)
    return int(limit), max(0, int(limit) - int(used) + max(map(int, cached), default=0))
