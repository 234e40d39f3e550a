# SPDX-License-Identifier: Apache-2.0
"""Folders that are given to an object apply to what is done on its behalf, and to nothing else."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

import vmm
from tests.vmm.small_guests import make_machine
from tests.vmm.stage import kill_all
from vmm.host.proc import python_environment
from vmm.host.systemd import kept_environment
from vmm.model import paths
from vmm.model.folders import Folders, in_use, uses_own_folders
from vmm.model.spec import make_spec
from vmm.store import registry


@pytest.fixture(autouse=True)
def environment(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that the environment names."""
    monkeypatch.setenv("VMM_HOME", str(short_path / "usual"))
    monkeypatch.setenv("VMM_RUNTIME", str(short_path / "usual-run"))


def test_the_environment_is_the_default(short_path: Path) -> None:
    """A manager without its own folders works with those of the environment, at each call."""
    registry.add(make_spec(name="web"))
    assert vmm.Manager().names() == ["web"] and paths.runtime_home() == str(short_path / "usual-run")


def test_two_managers_side_by_side(short_path: Path) -> None:
    """Each manager sees its own machines, and so do the objects that it returns."""
    one, two = (
        vmm.Manager(home=short_path / "one"),
        vmm.Manager(home=str(short_path / "two"), runtime=short_path / "run"),
    )
    one.create("web")
    two.create("db")
    assert (one.names(), two.names(), vmm.Manager().names()) == (["web"], ["db"], [])
    assert (short_path / "one" / "machines" / "web" / "machine.json").exists()
    snapshots, guest = one.snapshots("web"), two.guest("db")
    assert snapshots.tree().snapshots == {}
    assert guest.set_item("role", "database") is False and guest.get_item("role").value == "database"
    snapshots.create("first")
    assert [snapshot.name for snapshot in snapshots.tree().snapshots.values()] == ["first"]
    one.delete("web", with_snapshots=True)
    assert one.names() == [] and in_use() == Folders()


def test_folders_apply_to_one_thread(short_path: Path) -> None:
    """The folders of one thread are not those of another."""
    seen: list[str] = []
    with Folders.given(home=short_path / "one").used():
        other = threading.Thread(target=lambda: seen.append(paths.home()))
        other.start()
        other.join()
        assert paths.home() == str(short_path / "one")
    assert seen == [str(short_path / "usual")] and paths.home() == str(short_path / "usual")


def test_folders_end_with_an_error(short_path: Path) -> None:
    """A call that fails leaves no folders behind."""
    with pytest.raises(vmm.NotFound):
        vmm.Manager(home=short_path / "one").show("web")
    assert in_use() == Folders()


def test_processes_inherit_the_folders(short_path: Path) -> None:
    """A process started during the call works with the same folders; a folder that was not given comes from the
    environment."""
    with Folders.given(home=short_path / "one").used():
        found = python_environment()
        assert found["VMM_HOME"] == str(short_path / "one") and found["VMM_RUNTIME"] == os.environ["VMM_RUNTIME"]
        assert kept_environment()["VMM_HOME"] == str(short_path / "one")
    assert python_environment()["VMM_HOME"] == os.environ["VMM_HOME"]


def test_a_manager_made_inside_a_call_has_its_folders(short_path: Path) -> None:
    """Code that makes a manager inside a call works with the folders of that call."""
    with Folders.given(home=short_path / "one", runtime=short_path / "run").used():
        inner = vmm.Manager(runtime=short_path / "other")
    assert inner.folders == Folders(str(short_path / "one"), str(short_path / "other"))


def test_every_public_method_uses_the_folders(short_path: Path) -> None:
    """Every public method of a class runs with its folders, and a generator, whose body runs later, is refused."""

    @uses_own_folders
    class Reader:
        folders = Folders(home=str(short_path / "one"))

        def home(self) -> str:
            """The home that it works with."""
            return paths.home()

    assert Reader().home() == str(short_path / "one") and Reader.home.__doc__ == "The home that it works with."
    for public in (vmm.Manager, vmm.MachineSnapshots, vmm.GuestAccess):
        names = [name for name, one in vars(public).items() if callable(one) and not name.startswith("_")]
        assert names and all(hasattr(getattr(public, name), "__wrapped__") for name in names)

    class Late:
        folders = Folders()

        def lines(self):  # type: ignore[no-untyped-def]
            yield paths.home()

    with pytest.raises(AssertionError, match="run later"):
        uses_own_folders(Late)


@pytest.mark.kvm
def test_a_machine_runs_with_its_managers_folders(short_path: Path) -> None:
    """Its processes work with the folders of the manager that started it, whatever the environment says."""
    runtime = Path(tempfile.mkdtemp(prefix="vmmt-", dir="/tmp"))  # a short name: sockets lie in there
    runtime.chmod(0o711)
    manager = vmm.Manager(home=short_path / "one", runtime=runtime)
    try:
        make_machine(manager, short_path)
        manager.start("small")
        pids = manager.show("small").pids or {}
        for part in ("keeper", "worker"):
            variables = Path(f"/proc/{pids[part]}/environ").read_bytes().split(b"\0")
            assert f"VMM_HOME={short_path / 'one'}".encode() in variables
            assert f"VMM_RUNTIME={runtime}".encode() in variables
        assert vmm.Manager().names() == [] and not (short_path / "usual-run").exists()
        manager.stop("small")
        assert manager.state("small") is vmm.MachineState.OFF
    finally:
        kill_all(runtime)
        shutil.rmtree(runtime, ignore_errors=True)
