"""Limits of control groups of both versions, read from made-up folders."""

import pytest

from pipeline.profiling import cgroup

MIB = 2**20
NO_LIMIT = 9223372036854771712  # version 1


@pytest.fixture
def limits(tmp_path):
    """The limits that these files below `/sys/fs/cgroup` set for a process with this `/proc/self/cgroup`."""

    def read(files, membership="0::/"):
        texts = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": membership}
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return cgroup.limits(tmp_path)

    return read


@pytest.mark.parametrize(
    ("files", "membership"),
    [
        ({"cpu.max": "max 100000", "memory.max": "max", "memory.current": 5}, "0::/"),
        (
            {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000, "memory/memory.limit_in_bytes": NO_LIMIT},
            "2:cpu:/\n1:memory:/",
        ),
        ({}, ""),
    ],
    ids=["v2", "v1", "no groups"],
)
def test_no_limit_is_none(limits, files, membership):
    assert limits(files, membership) == (None, None, None)


def test_version_2_takes_the_lowest_limit_of_the_group_and_its_parents(limits):
    files = {
        "kubepods/cpu.max": "400000 100000",
        "kubepods/pod1/cpu.max": "150000 100000",
        "kubepods/pod1/job/cpu.max": "max 100000",
        "kubepods/memory.max": 16 * MIB,
        "kubepods/memory.current": 15 * MIB,  # most of it another pod's
        "kubepods/pod1/memory.max": 8 * MIB,
        "kubepods/pod1/memory.current": 5 * MIB,
        "kubepods/pod1/memory.stat": f"inactive_anon 1\ninactive_file {2 * MIB}",
        "other/memory.max": MIB,
        "other/cpu.max": "1000 100000",
    }
    assert limits(files, "0::/kubepods/pod1/job") == (1.5, 8 * MIB, MIB)


def test_version_1_has_a_path_for_each_controller(limits):
    files = {
        "cpu/batch/cpu.cfs_quota_us": 200000,
        "cpu/batch/cpu.cfs_period_us": 100000,
        "memory/batch/b:c/memory.limit_in_bytes": 8 * MIB,
        "memory/batch/b:c/memory.usage_in_bytes": 6 * MIB,
        "memory/batch/b:c/memory.stat": f"inactive_file {MIB}\ntotal_inactive_file {4 * MIB}",
        "memory/batch/a/memory.limit_in_bytes": MIB,
        "memory/memory.limit_in_bytes": NO_LIMIT,
    }
    membership = "5:cpu,cpuacct:/batch/a\n4:memory:/batch/b:c\n1:name=systemd:/init\n0::/"
    assert limits(files, membership) == (2.0, 8 * MIB, 6 * MIB)


@pytest.mark.parametrize("membership", ["4:memory:/docker/abc", "4:memory:/../other", ""])
def test_a_container_sees_its_own_group_as_the_mounts_root(limits, membership):
    files = {"memory/memory.limit_in_bytes": 8 * MIB, "memory/memory.usage_in_bytes": MIB}
    files |= {"cpu.max": "50000 100000", "../other/memory.limit_in_bytes": 1}
    assert limits(files, membership) == (0.5, 8 * MIB, 7 * MIB)


@pytest.mark.parametrize(("used", "free"), [({}, 8 * MIB), ({"memory.current": 9 * MIB}, 0)])
def test_free_memory_is_at_most_the_limit_and_never_negative(limits, used, free):
    assert limits({"memory.max": 8 * MIB} | used).free_bytes == free
