# SPDX-License-Identifier: Apache-2.0
"""Leftovers of dead makers are removed, and nothing that is not provably theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vhdkit
from tests.support import require_root
from vhdkit import unfinished
from vhdkit.folder import NewFile
from vhdkit.store import FileStore

_MAKER = """
import sys, time
from vhdkit.folder import NewFile
with NewFile(sys.argv[1]) as new:
    new.store.pwrite(0, b"half")
    print("begun", flush=True)
    time.sleep(600)
"""


def killed(folder: Path) -> Path:
    """The file that a program left in the folder when it was killed while making it."""
    maker = subprocess.Popen([sys.executable, "-c", _MAKER, folder / "new.vhd"], stdout=subprocess.PIPE)
    try:
        assert maker.stdout is not None and maker.stdout.readline() == b"begun\n"
        assert list_after_sweep(folder) != [], "its maker is still alive"
    finally:
        maker.kill()
        maker.communicate()
    (path,) = unfinished.parts(str(folder))
    return Path(path)


def list_after_sweep(folder: Path) -> list[str]:
    """The files under construction that a sweep leaves."""
    unfinished.sweep(str(folder))
    return list(unfinished.parts(str(folder)))


def renamed(path: Path, *, boot: str | None = None, namespace: str | None = None, pid: str | None = None) -> Path:
    """The same file with another maker in its name."""
    head, *rest = path.name.removeprefix(".vhdkit-").split("-")
    words = [boot or head, namespace or rest[0], pid or rest[1], *rest[2:]]
    return path.rename(path.with_name(".vhdkit-" + "-".join(words)))


def test_the_next_file_removes_leftovers(tmp_path: Path) -> None:
    """The file of a killed program is removed when a file is made beside it; that of a living one stays."""
    left = killed(tmp_path)
    with NewFile(tmp_path / "other.vhd"):
        assert not left.exists() and len(list(unfinished.parts(str(tmp_path)))) == 1
        vhdkit.create_image(tmp_path / "third.vhd", 1 << 20)
        assert len(list(unfinished.parts(str(tmp_path)))) == 1


def test_a_reused_process_number(tmp_path: Path) -> None:
    """A process with the same number but another start time is not the maker; the maker itself is alive."""
    left = killed(tmp_path)
    boot, namespace, _, ticks, chance = left.name.removeprefix(".vhdkit-").split("-")
    mine = left.rename(left.with_name(unfinished.part_name()))
    assert list_after_sweep(tmp_path) == [str(mine)]
    mine.rename(left.with_name(f".vhdkit-{boot}-{namespace}-{os.getpid()}-{ticks}-{chance}"))
    assert list_after_sweep(tmp_path) == []


@pytest.mark.parametrize("strange", [{"namespace": "1"}, {"pid": "0"}, {"pid": "9999999999"}])
def test_a_maker_that_cannot_be_identified(tmp_path: Path, strange: dict[str, str]) -> None:
    """Whether a maker in another PID namespace, or with an invalid number, lives is unknown."""
    left = renamed(killed(tmp_path), **strange)
    assert list_after_sweep(tmp_path) == [str(left)]


@pytest.mark.parametrize("is_local", [True, False])
def test_another_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool) -> None:
    """A leftover from before a restart is removed on a local file system; elsewhere it may belong to another host."""
    left = renamed(killed(tmp_path), boot="0123456789ab")
    monkeypatch.setattr("vhdkit.maker._is_local", lambda device: is_local)
    monkeypatch.setattr("vhdkit.maker._booted_unix_seconds", lambda: float("inf"))
    assert list_after_sweep(tmp_path) == ([] if is_local else [str(left)])


def test_a_name_without_a_maker(tmp_path: Path) -> None:
    """The names of version 0.1.0, and those on a host without the necessary facts, do not identify the maker."""
    left = killed(tmp_path)
    left.rename(tmp_path / ".vhdkit-0123456789abcdef.part")
    assert list_after_sweep(tmp_path) == [str(tmp_path / ".vhdkit-0123456789abcdef.part")]


def test_a_file_in_use(tmp_path: Path) -> None:
    """A dead maker's file that another process writes to, such as a forked one, stays until it is released."""
    left = killed(tmp_path)
    with FileStore.open(str(left), writable=True) as store:
        store.lock(writer=True)
        assert list_after_sweep(tmp_path) == [str(left)]
    assert list_after_sweep(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_entries_that_are_not_files(tmp_path: Path, kind: str) -> None:
    """A link, a folder and a pipe with such a name stay, and the link's target is not touched."""
    left = killed(tmp_path)
    target = left.rename(tmp_path / "precious")
    if kind == "link":
        left.symlink_to(target)
    elif kind == "folder":
        left.mkdir()
    else:
        os.mkfifo(left)
    assert list_after_sweep(tmp_path) == [] and os.path.lexists(left) and target.read_bytes() == b"half"


def test_a_file_of_another_user(tmp_path: Path) -> None:
    """Root does not remove another user's file because of its name."""
    require_root()
    left = killed(tmp_path)
    os.chown(left, 12345, 12345)
    assert list_after_sweep(tmp_path) == [str(left)]


def test_a_command_that_is_killed_and_run_again(tmp_path: Path) -> None:
    """After a killed `vhdkit create` a second one leaves its image in the folder, and nothing else."""
    killed(tmp_path)
    command = [sys.executable, "-m", "vhdkit", "create", str(tmp_path / "new.vhd"), "--size", "1M", "-q"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
    assert os.listdir(tmp_path) == ["new.vhd"]
