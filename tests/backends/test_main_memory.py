"""Limits of containers."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from backends.main_memory import main_memory

GB = 10**9


def group(folder, names, limit, used, files=0):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    prefix = "total_" if names == V1 else ""
    (folder / "memory.stat").write_text(
        f"anon 5\n{prefix}active_file {files}\n{prefix}inactive_file 0\n"
    )


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


def membership(root, text):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


def test_without_control_groups_it_is_the_machines(tmp_path):
    found = main_memory(tmp_path)
    assert found.total == psutil.virtual_memory().total
    membership(tmp_path, "0::/\n")
    group(tmp_path / "sys/fs/cgroup", V2, "max", 4 * GB)
    assert main_memory(tmp_path).total == found.total


def test_smallest_limit_of_all_enclosing_groups_counts(tmp_path):
    membership(tmp_path, "0::/docker/one\n")
    top = tmp_path / "sys/fs/cgroup"
    group(top / "docker/one", V2, "max", GB)
    group(top / "docker", V2, 4 * GB, 3 * GB, files=GB)
    group(top, V2, 8 * GB, 3 * GB)
    assert main_memory(tmp_path) == (4 * GB, 2 * GB)


def test_path_of_the_machine_is_not_there_in_a_container(tmp_path):
    membership(tmp_path, "5:devices:/docker/one\n4:memory:/docker/one\n0::/\n")
    group(tmp_path / "sys/fs/cgroup/memory", V1, 2 * GB, GB)
    assert main_memory(tmp_path) == (2 * GB, GB)


def test_group_that_holds_more_than_it_may_has_nothing_left(tmp_path):
    membership(tmp_path, "0::/\n")
    group(tmp_path / "sys/fs/cgroup", V2, GB, 2 * GB)
    assert main_memory(tmp_path) == (GB, 0)


def test_limit_of_a_real_group():
    """Where this user may make one."""
    tops = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    name, folder = next(
        (
            (name, top / f"limited-{os.getpid()}")
            for top, name in zip(tops, (V1[0], V2[0]), strict=True)
            if (top / "cgroup.procs").exists()
        ),
        ("", None),
    )
    try:
        if folder is None:
            raise OSError("there are none")
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    code = "from backends.main_memory import main_memory; print(*main_memory())"
    enter = lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
    command = [sys.executable, "-c", code]
    try:
        if not (folder / name).exists():
            pytest.skip("memory is not limited by control groups here")
        (folder / name).write_text("100000000")
        done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, check=True)
    finally:
        folder.rmdir()
    total, available = map(int, done.stdout.split())
    assert abs(total - 100_000_000) < 4096 and 0 < available < total
