"""Limits of control groups, read from made-up trees of both versions."""

import pytest

from pipeline.profiling import cgroup

MIB = 2**20
NO_LIMIT = 9223372036854771712  # version 1
TMPFS = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755"
UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
FREE = {"memory.max": 8 * MIB, "memory.current": 5 * MIB, "memory.stat": f"inactive_anon 1\ninactive_file {2 * MIB}"}


def v1(controllers, top="/", point=None):
    """A line of mountinfo: a mount of version 1."""
    return f"32 31 0:29 {top} {point or f'/sys/fs/cgroup/{controllers}'} rw,relatime - cgroup cgroup rw,{controllers}"


@pytest.fixture
def limits(tmp_path):
    """The limits that files below `/sys/fs/cgroup` set for a process with these texts of /proc."""

    def put(files, membership="0::/", mounts=(UNIFIED,), below="sys/fs/cgroup"):
        texts = {f"{below}/{name}": text for name, text in files.items()}
        texts |= {"proc/self/cgroup": membership, "proc/self/mountinfo": "\n".join(mounts)}
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return cgroup.limits(tmp_path)

    return put


def test_without_groups_there_are_no_limits(tmp_path):
    assert cgroup.limits(tmp_path) == (None, None, None)


def test_this_machines_own_limits_can_be_read():
    found = cgroup.limits()
    assert found.cores is None or found.cores > 0
    assert (found.memory_bytes is None) == (found.free_bytes is None)


@pytest.mark.parametrize(
    "files",
    [
        {"cpu.max": "max 100000", "memory.max": "max", "memory.current": 5},
        {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000, "memory/memory.limit_in_bytes": NO_LIMIT},
        {"cpu.max": "", "memory.max": ""},
    ],
    ids=["v2", "v1", "empty"],
)
def test_no_limit_is_none(limits, files):
    assert limits(files) == (None, None, None)


@pytest.mark.parametrize(
    "mounts", [(), (TMPFS, v1("cpu"), v1("memory"), UNIFIED.replace("cgroup rw", "cgroup/unified rw"))]
)
def test_files_bound_to_the_usual_places_count_whatever_is_mounted_below(limits, mounts):
    files = {"cpu.max": "50000 100000", "memory.max": 8 * MIB, "memory.current": 5 * MIB, "memory.stat": ""}
    membership = "4:memory:/job/a\n1:cpu:/\n0::/user.slice"
    assert limits(files, membership, mounts) == (0.5, 8 * MIB, 3 * MIB)


def test_version_1_at_the_usual_places(limits):
    files = {
        "cpu/cpu.cfs_quota_us": 150000,
        "cpu/cpu.cfs_period_us": 100000,
        "memory/memory.limit_in_bytes": 8 * MIB,
        "memory/memory.usage_in_bytes": 6 * MIB,
        "memory/memory.stat": f"inactive_file {MIB}\ntotal_inactive_file {4 * MIB}",
    }
    assert limits(files, "", ()) == (1.5, 8 * MIB, 6 * MIB)


def test_the_smallest_limit_of_any_level_holds(limits):
    files = {
        "kubepods/cpu.max": "400000 100000",
        "kubepods/pod1/cpu.max": "150000 100000",
        "kubepods/pod1/job/cpu.max": "max 100000",
        "kubepods/memory.max": 16 * MIB,
        "kubepods/memory.current": 15 * MIB,  # another pod's, for the most part
        **{f"kubepods/pod1/{name}": text for name, text in FREE.items()},
        "other/memory.max": MIB,
        "other/cpu.max": "1000 100000",
    }
    assert limits(files, "0::/kubepods/pod1/job") == (1.5, 8 * MIB, MIB)


def test_a_group_without_its_use_has_at_most_its_limit_free(limits):
    assert limits({"memory.max": 8 * MIB}) == (None, 8 * MIB, 8 * MIB)


def test_a_group_above_its_limit_has_nothing_free(limits):
    assert limits({"memory.max": 8 * MIB, "memory.current": 9 * MIB}).free_bytes == 0


def test_version_1_has_a_path_for_each_controller(limits):
    membership = "5:cpu,cpuacct:/batch/a\n4:memory:/batch/b:c\n1:name=systemd:/init\n0::/"
    files = {
        "cpu,cpuacct/batch/cpu.cfs_quota_us": 200000,
        "cpu,cpuacct/batch/cpu.cfs_period_us": 100000,
        "memory/batch/b:c/memory.limit_in_bytes": 8 * MIB,
        "memory/batch/b:c/memory.usage_in_bytes": MIB,
        "memory/batch/a/memory.limit_in_bytes": MIB,
        "memory/memory.limit_in_bytes": NO_LIMIT,
    }
    assert limits(files, membership, (TMPFS, v1("cpu,cpuacct"), v1("memory"))) == (2.0, 8 * MIB, 7 * MIB)


def test_hybrid_systems_limit_by_either_version(limits):
    unified = UNIFIED.replace("cgroup rw", "cgroup/unified rw")
    files = {
        "unified/app/cpu.max": "300000 100000",
        "memory/app/memory.limit_in_bytes": 8 * MIB,
        "memory/app/memory.usage_in_bytes": 2 * MIB,
    }
    assert limits(files, "4:memory:/app\n0::/app", (TMPFS, v1("memory"), unified)) == (3.0, 8 * MIB, 6 * MIB)


def test_a_container_sees_its_own_group_as_the_mounts_root(limits):
    files = {
        "memory/memory.limit_in_bytes": 8 * MIB,
        "memory/memory.usage_in_bytes": MIB,
        "memory/sub/memory.limit_in_bytes": 4 * MIB,
    }
    mounts = (v1("memory", top="/docker/abc"),)
    assert limits(files, "4:memory:/docker/abc", mounts).memory_bytes == 8 * MIB
    assert limits(files, "4:memory:/docker/abc/sub", mounts).memory_bytes == 4 * MIB


@pytest.mark.parametrize(("top", "group"), [("/docker/abc", "/"), ("/..", "/"), ("/", "/../other")])
def test_of_a_group_of_another_namespace_the_mounts_own_counts(limits, top, group):
    mounts = (UNIFIED.replace(" / /sys/fs/cgroup ", f" {top} /run/groups/here "),)
    files = {"here/cpu.max": "50000 100000", "other/cpu.max": "10000 100000"}
    assert limits(files, f"0::{group}", mounts, below="run/groups").cores == 0.5


def test_groups_may_be_mounted_anywhere_with_blanks_in_the_name(limits):
    mounts = (v1("cpu", point=r"/mnt/my\040groups"), v1("memory", point="/dev/memory"))
    files = {"a/cpu.cfs_quota_us": 50000, "a/cpu.cfs_period_us": 100000}
    assert limits(files, "1:cpu:/a", mounts, below="mnt/my groups").cores == 0.5


def test_the_mount_of_another_controller_is_not_read(limits):
    files = {"cpu.cfs_quota_us": 50000, "cpu.cfs_period_us": 100000, "memory.limit_in_bytes": MIB}
    assert limits(files, "1:cpuset:/", (v1("cpuset", point="/cpuset"),), below="cpuset") == (None, None, None)
