# SPDX-License-Identifier: Apache-2.0
"""Facts about the host, from made-up files and from the real ones."""

from __future__ import annotations

import os
from pathlib import Path

from vmm.host import info

CPUINFO = """processor\t: 0
model name\t: Fast 9000
flags\t\t: fpu vmx hypervisor

processor\t: 1
model name\t: Other
"""


def host_of(tmp_path: Path, **files: str) -> info.HostInfo:
    """A host with these files; "__" stands for "/"."""
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return info.gather(str(tmp_path))


def test_facts_come_from_the_files(tmp_path: Path) -> None:
    """Processor, virtualization, memory and system are read from the files."""
    host = host_of(
        tmp_path,
        proc__cpuinfo=CPUINFO,
        proc__meminfo="MemTotal:    2048 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\n",
        etc__os_release="",
    )
    assert (host.processor, host.virtualization, host.is_guest) == ("Fast 9000", "vmx", True)
    assert (host.memory_bytes, host.available_bytes) == (2 << 20, 1 << 20)


def test_the_name_of_the_system(tmp_path: Path) -> None:
    """It is read with and without quotes."""
    for text, name in (('ID=x\nPRETTY_NAME="Some Linux 1"\n', "Some Linux 1"), ("PRETTY_NAME=Plain\n", "Plain")):
        (tmp_path / "etc").mkdir(exist_ok=True)
        (tmp_path / "etc/os-release").write_text(text)
        assert info.gather(str(tmp_path)).system == name


def test_missing_facts_are_none(tmp_path: Path) -> None:
    """Without files, or with malformed ones, the facts are None."""
    host = host_of(tmp_path, proc__meminfo="MemTotal: lots\n", proc__cpuinfo="no pairs here\n")
    assert (host.system, host.processor, host.virtualization, host.memory_bytes) == (None, None, None, None)
    assert not host.is_guest


def test_the_real_host() -> None:
    """The host that runs the tests has processors and memory."""
    host = info.gather()
    assert host.processor_count == len(os.sched_getaffinity(0)) and (host.memory_bytes or 0) > 1 << 20
