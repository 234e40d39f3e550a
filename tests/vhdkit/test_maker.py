# SPDX-License-Identifier: Apache-2.0
"""A maker counts as dead only if no other process, and no other host, can be the one that a word identifies."""

from __future__ import annotations

import builtins
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import require_root
from vhdkit import maker

_OTHER_BOOT = "0123456789ab-4026531836-1-1"


def facts(device: int = os.makedev(253, 7), changed_unix_seconds: float = 0) -> os.stat_result:
    """Facts about a file, by default from before every boot."""
    times = (0, 0, changed_unix_seconds)
    return os.stat_result((0o100600, 1, device, 1, 0, 0, 0, *times))


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace the mount table."""

    def replace(lines: str) -> None:
        def opening(path: Any, *args: Any, **options: Any) -> Any:
            if path == "/proc/self/mountinfo":
                return io.BytesIO(lines.encode())
            return builtins.open(path, *args, **options)

        monkeypatch.setattr(maker, "open", opening, raising=False)

    return replace


def mount(kind: str, number: str = "253:7", tags: str = "shared:1 ") -> str:
    """A line of /proc/self/mountinfo."""
    return f"98 1 {number} / /srv rw,relatime {tags}- {kind} /dev/mapper/lun rw\n"


def test_a_process_that_lives_and_one_that_ended() -> None:
    """Our own word identifies a living process, and a child's word a dead one once the child has ended."""
    word = maker.maker_word()
    assert word is not None and not maker.is_maker_dead(word, facts())
    program = "import vhdkit; print(vhdkit.maker_word())"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert maker.is_maker_dead(done.stdout.strip(), facts())


def test_a_reused_process_number() -> None:
    """A process with the same number but another start time is not the maker."""
    boot, namespace, pid, ticks = (maker.maker_word() or "").split("-")
    assert maker.is_maker_dead(f"{boot}-{namespace}-{pid}-{int(ticks) + 1}", facts())
    assert not maker.is_maker_dead(f"{boot}-{int(namespace) + 1}-{pid}-{int(ticks) + 1}", facts())


@pytest.mark.parametrize("word", ["", "-", "x" * 500, "0123456789ab-1-1", "0123456789AB-1-1-1", "0123456789ab-1-١-1"])
def test_invalid_words(word: str, mounted: Callable[[str], None]) -> None:
    """Any other text identifies no process."""
    mounted(mount("ext4"))
    assert not maker.is_maker_dead(word, facts())


@pytest.mark.parametrize(
    ("table", "is_dead"),
    [
        (mount("ext4"), True),
        (mount("xfs", tags=""), True),
        (mount("xfs") + mount("xfs"), True),
        (mount("ocfs2"), False),
        (mount("gfs2"), False),
        (mount("ext4") + mount("ocfs2"), False),
        (mount("fuseblk"), False),
        (mount("ext4", number="253:8"), False),
        ("nonsense\n98 1 253:7 / /srv rw -\n", False),
        ("", False),
    ],
)
def test_another_boot(table: str, is_dead: bool, mounted: Callable[[str], None]) -> None:
    """A maker of another boot is dead only on a file system that a single host mounts: a cluster file system on a
    shared disk has files of other hosts."""
    mounted(table)
    assert maker.is_maker_dead(_OTHER_BOOT, facts()) is is_dead


def test_another_boot_of_a_younger_file(mounted: Callable[[str], None]) -> None:
    """A file written after this host started belongs to another host, such as a container with its own boot id."""
    mounted(mount("ext4"))
    booted_seconds_ago = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert not maker.is_maker_dead(_OTHER_BOOT, facts(changed_unix_seconds=time.time() - booted_seconds_ago / 2))
    assert maker.is_maker_dead(_OTHER_BOOT, facts(changed_unix_seconds=time.time() - booted_seconds_ago - 60))


def test_processes_of_another_namespace_in_proc() -> None:
    """If /proc shows the processes of another PID namespace, its numbers mean other processes than ours."""
    require_root()
    program = "import vhdkit; print(vhdkit.maker_word())"
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", program]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "None\n"


@pytest.mark.parametrize("kind", ["nfs4", "tmpfs", "ext4"])
def test_another_boot_without_a_block_device(kind: str, mounted: Callable[[str], None]) -> None:
    """A file system without a block device is on a server or in memory: nothing is known about its hosts."""
    mounted(mount(kind, number="0:45"))
    assert not maker.is_maker_dead(_OTHER_BOOT, facts(os.makedev(0, 45)))


def test_a_host_without_a_mount_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the mount table cannot be read, nothing is known."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError

    maker.maker_word()  # the name of this host was read before
    monkeypatch.setattr(maker, "open", refuse, raising=False)
    assert not maker.is_maker_dead(_OTHER_BOOT, facts())
