# SPDX-License-Identifier: Apache-2.0
"""What a killed command left unfinished is removed by the next one, but nothing that may belong to others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import require_root
from vmm.model import paths, unfinished
from vmm.model.spec import make_spec
from vmm.store import registry
from vmm.store.snapshots.memory import SnapshotFolder

_DIES_IN = """
import os, signal, sys
def die(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)
os.{call} = die
{work}
"""


def dies(call: str, work: str) -> None:
    """Run a program that is killed when it calls that function of the system."""
    program = _DIES_IN.format(call=call, work=work)
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == -9


def half_written(folder: Path) -> Path:
    """The file left by a process that was killed while it wrote it."""
    dies(
        "rename", f"from vmm.model.paths import write_whole; write_whole({str(folder / 'snapshots.json')!r}, b'half')"
    )
    (left,) = folder.iterdir()
    return left


def named(path: Path, number: int, word: str) -> Path:
    """The same file with another maker in its name."""
    words = path.name.removeprefix(".").split("-")
    words[number] = word
    return path.rename(path.with_name("." + "-".join(words)))


def test_an_unfinished_file_is_removed(tmp_path: Path) -> None:
    """The next command that writes a file in the folder removes it, but not one that a living process writes."""
    left = half_written(tmp_path)
    living = Path(unfinished.part_of(str(tmp_path / "other.json")))
    living.write_bytes(b"mine")
    paths.write_whole(str(tmp_path / "machine.json"), b"{}")
    assert not left.exists() and living.exists() and (tmp_path / "machine.json").read_bytes() == b"{}"


@pytest.mark.parametrize(("number", "word"), [(1, "1"), (2, "0"), (2, "99999999999")])
def test_files_of_an_unknown_maker_stay(tmp_path: Path, number: int, word: str) -> None:
    """It cannot be known whether a maker in another process namespace, or with a malformed number, is alive."""
    left = named(half_written(tmp_path), number, word)
    unfinished.sweep(str(tmp_path))
    assert left.exists()


@pytest.mark.parametrize("is_local", [True, False])
def test_files_from_an_earlier_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool) -> None:
    """Leftovers from before a restart are removed from a local file system; elsewhere they may be another host's."""
    left = named(half_written(tmp_path), 0, "0123456789ab")
    monkeypatch.setattr("vhdkit.maker._is_local", lambda device: is_local)
    monkeypatch.setattr("vhdkit.maker._booted_unix_seconds", lambda: float("inf"))
    unfinished.sweep(str(tmp_path))
    assert left.exists() is not is_local


def test_a_process_with_the_same_number_is_not_the_maker(tmp_path: Path) -> None:
    """A process with the same number that began at another time is not the maker."""
    left = named(half_written(tmp_path), 2, str(os.getpid()))
    unfinished.sweep(str(tmp_path))
    assert not left.exists()


def test_foreign_files_stay(tmp_path: Path) -> None:
    """Another user's file stays, and so do the target of a link, and a folder where only files are cleaned up."""
    left = half_written(tmp_path)
    precious = left.rename(tmp_path / "precious")
    left.symlink_to(precious)
    unfinished.sweep(str(tmp_path), folders=True)
    assert left.is_symlink() and precious.read_bytes() == b"half"
    left.unlink()
    left.mkdir()
    unfinished.sweep(str(tmp_path))
    assert left.is_dir()
    require_root()
    os.chown(left, 12345, 12345)
    unfinished.sweep(str(tmp_path), folders=True)
    assert left.is_dir()


_ADD = "from vmm.store import registry; from vmm.model.spec import make_spec; registry.add(make_spec(name='web'))"
_REMOVE = "from vmm.store import registry; held = registry.changing('web'); registry.remove(held.__enter__())"


@pytest.mark.parametrize(("call", "work"), [("rename", _ADD), ("unlink", _REMOVE)])
def test_an_unfinished_machine_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, work: str
) -> None:
    """Its hidden folder is removed when the next machine is made, with everything in it."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", "/tmp/vmm-test-run")
    machines = tmp_path / "home" / "machines"
    if work == _REMOVE:
        registry.add(make_spec(name="web"))
    dies(call, work)
    (left,) = machines.iterdir()
    assert left.name.startswith(".web.")
    registry.add(make_spec(name="db"))
    assert os.listdir(machines) == ["db"]


def test_an_unfinished_snapshot_is_removed(tmp_path: Path) -> None:
    """A snapshot's folder that contains only such files is removed as a whole."""
    folder = tmp_path / "0123"
    folder.mkdir()
    half_written(folder)
    assert SnapshotFolder(str(folder)).discard() == [] and not folder.exists()
