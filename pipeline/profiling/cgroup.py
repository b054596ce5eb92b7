"""What Linux' control groups, version 1 and 2, allow this process: CPU time and memory.

By the kernel's cgroup-v2.rst ("CPU", "Memory"), cgroup-v1/memory.rst and scheduler/sched-bwc.rst, and by
proc_pid_mountinfo(5). The CPUs of a set (`cpuset`) are not read here: os.sched_getaffinity returns no others.
"""

import operator
import re
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipeline.files import contents

UNLIMITED_BYTES = 2**60
"""Version 1 writes "no limit" as the largest count of whole pages, about 2**63 bytes."""

MOUNT = re.compile(r"^\S+ \S+ \S+ (\S+) (\S+) .*?- (cgroup2?) \S* (\S+)$", re.MULTILINE)
"""A line of mountinfo: the group that the mount shows as its root, the mount point, the type, the options."""


class Limits(NamedTuple):
    """What all groups of the process allow together. None where no group sets a limit, as on other systems."""

    cores: float | None
    """CPU time, in cores."""
    memory_bytes: int | None
    free_bytes: int | None
    """Memory that the process can still take: the rest of the limit, and cached files that the kernel can drop."""


def limits(root: Path = Path("/")) -> Limits:
    """The smallest limits from the process's own group up to the highest group that it can see. `root` is the folder
    that holds `proc` and `sys`."""
    cores = filter(None, map(_cores, _groups(root, "cpu")))
    memory = list(filter(None, map(_memory, _groups(root, "memory"))))
    return Limits(
        min(cores, default=None),
        min((limit for limit, _ in memory), default=None),
        min((free for _, free in memory), default=None),
    )


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of the groups, of either version, that may limit the process by `controller`. Not all exist."""
    paths: dict[str, str] = {}
    for line in contents(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        paths |= dict.fromkeys(names.split(","), path)  # version 2 has an empty name
    # Files that were mounted here from elsewhere are not of a cgroup's type.
    folders = [root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller]
    for top, point, version, options in MOUNT.findall(contents(root / "proc/self/mountinfo")):
        if version == "cgroup2" or controller in options.split(","):
            group = paths.get("" if version == "cgroup2" else controller, "/")
            folders += _levels(root / _plain(point).lstrip("/"), _plain(top), group)
    return folders


def _levels(point: Path, top: str, group: str) -> list[Path]:
    """Folders from the mount point, which shows the group `top`, down to `group`. A group outside `top`, as another
    namespace's is, can't be seen: then the mount point alone."""
    path = PurePosixPath(group)
    if ".." in path.parts or not path.is_relative_to(top):
        return [point]
    return list(accumulate(path.relative_to(top).parts, operator.truediv, initial=point))


def _plain(path: str) -> str:
    """A path of mountinfo, where blanks and backslashes are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _cores(folder: Path) -> float | None:
    words = contents(folder / "cpu.max").split() or [
        contents(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")
    ]
    if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
        return int(words[0]) / int(words[1])
    return None  # "max" or -1: no limit


def _memory(folder: Path) -> tuple[int, int] | None:
    """The limit of a group and what is free of it, in bytes."""
    limit = contents(folder / "memory.max") or contents(folder / "memory.limit_in_bytes")
    if not limit.isdecimal() or int(limit) >= UNLIMITED_BYTES:
        return None
    used = contents(folder / "memory.current") or contents(folder / "memory.usage_in_bytes")
    if not used.isdecimal():
        return int(limit), int(limit)
    # Usage counts cached pages of files, too: a data set just read would seem to fill the memory. Version 1 lists the
    # group's own and, as `total_`, those of all groups below it, too.
    cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", contents(folder / "memory.stat"), re.MULTILINE)
    return int(limit), max(0, int(limit) - int(used) + max(map(int, cached), default=0))
