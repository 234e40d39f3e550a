# SPDX-License-Identifier: Apache-2.0
"""What dead makers of files left is removed, and nothing that is not provably theirs."""

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
    """What a program that was killed while it made a file left in the folder."""
    maker = subprocess.Popen([sys.executable, "-c", _MAKER, folder / "new.vhd"], stdout=subprocess.PIPE)
    try:
        assert maker.stdout is not None and maker.stdout.readline() == b"begun\n"
        assert list_after_sweep(folder) != [], "its maker lives"
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


def test_the_next_file_clears_away(tmp_path: Path) -> None:
    """What a killed program left goes when a file is made beside it; what a living one makes stays."""
    left = killed(tmp_path)
    with NewFile(tmp_path / "other.vhd"):
        assert not left.exists() and len(list(unfinished.parts(str(tmp_path)))) == 1
        vhdkit.create_image(tmp_path / "third.vhd", 1 << 20)
        assert len(list(unfinished.parts(str(tmp_path)))) == 1


def test_a_number_that_another_process_has(tmp_path: Path) -> None:
    """A process of the same number that began at another time is not the maker; one that is the maker lives."""
    left = killed(tmp_path)
    boot, namespace, _, ticks, chance = left.name.removeprefix(".vhdkit-").split("-")
    mine = left.rename(left.with_name(unfinished.part_name()))
    assert list_after_sweep(tmp_path) == [str(mine)]
    mine.rename(left.with_name(f".vhdkit-{boot}-{namespace}-{os.getpid()}-{ticks}-{chance}"))
    assert list_after_sweep(tmp_path) == []


@pytest.mark.parametrize("strange", [{"namespace": "1"}, {"pid": "0"}, {"pid": "9999999999"}])
def test_a_maker_that_is_not_to_be_known(tmp_path: Path, strange: dict[str, str]) -> None:
    """Of another namespace of processes, as of a container, and of numbers that are none, nobody knows who lives."""
    left = renamed(killed(tmp_path), **strange)
    assert list_after_sweep(tmp_path) == [str(left)]


@pytest.mark.parametrize("is_local", [True, False])
def test_another_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool) -> None:
    """What is left from before a restart goes from a local file system; elsewhere it may be another host's."""
    left = renamed(killed(tmp_path), boot="0123456789ab")
    monkeypatch.setattr("vhdkit.maker._is_local", lambda device: is_local)
    monkeypatch.setattr("vhdkit.maker._booted_unix_seconds", lambda: float("inf"))
    assert list_after_sweep(tmp_path) == ([] if is_local else [str(left)])


def test_a_name_without_a_maker(tmp_path: Path) -> None:
    """The names of version 0.1.0, and those on a host that does not tell who we are, do not say who made the file."""
    left = killed(tmp_path)
    left.rename(tmp_path / ".vhdkit-0123456789abcdef.part")
    assert list_after_sweep(tmp_path) == [str(tmp_path / ".vhdkit-0123456789abcdef.part")]


def test_a_file_that_somebody_holds(tmp_path: Path) -> None:
    """A dead maker's file that another process writes to, as a forked one may, stays until it is let go."""
    left = killed(tmp_path)
    with FileStore.open(str(left), writable=True) as store:
        store.lock(writer=True)
        assert list_after_sweep(tmp_path) == [str(left)]
    assert list_after_sweep(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    """A link, a folder and a pipe with such a name stay, and what a link leads to is untouched."""
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
    """Root does not clear away what another user's file is called."""
    require_root()
    left = killed(tmp_path)
    os.chown(left, 12345, 12345)
    assert list_after_sweep(tmp_path) == [str(left)]


def test_a_command_that_is_killed_and_run_again(tmp_path: Path) -> None:
    """`vhdkit create` after a killed one leaves its image in the folder, and nothing else."""
    killed(tmp_path)
    command = [sys.executable, "-m", "vhdkit", "create", str(tmp_path / "new.vhd"), "--size", "1M", "-q"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
    assert os.listdir(tmp_path) == ["new.vhd"]
