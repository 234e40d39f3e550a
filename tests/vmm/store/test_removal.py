# SPDX-License-Identifier: Apache-2.0
"""What keeps an image from being removed: every record that names it, and every process that has it open.
INV-REMOVED-UNUSED."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.vmm.kvm.loops import loop_device
from vmm.host.proc import HeldLock
from vmm.model.errors import InUse
from vmm.model.spec import MachineSpec, make_spec
from vmm.store import registry
from vmm.store.registry import Machine
from vmm.store.removal import refuse_needed_folder, remove_image
from vmm.store.snapshots.journal import MergeOff
from vmm.store.snapshots.store import tree_path
from vmm.store.snapshots.tree import Image, Snapshot, Tree

_ID = "0" * 8 + "-0000" * 3 + "-" + "0" * 12


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for this test, and an image in it."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))
    vhdkit.create_image(tmp_path / "a.vhd", 1 << 20)
    return tmp_path


@pytest.fixture
def lock(folder: Path) -> Iterator[HeldLock]:
    """The lock of the machine that wants the image removed."""
    registry.add(make_spec(name="web"))
    with registry.changing("web") as machine:
        yield machine.lock


def with_disk(name: str, path: Path, **settings: object) -> MachineSpec:
    """A machine with this disk."""
    return make_spec(name=name, disks=[{"id": "disk-0", "path": str(path), **settings}])


def write_tree(machine: Machine, tree: Tree) -> None:
    """Make the tree the machine's."""
    Path(tree_path(machine.paths)).write_bytes(tree.to_json())


def snapshot_on(path: Path) -> Snapshot:
    """A snapshot that froze the image."""
    return Snapshot(
        id=_ID, name="first", created=0.0, parent=None, folder=str(path.parent / "snaps" / _ID),
        disks={"disk-0": str(path)}, taken_in="off",
    )  # fmt: skip


def by_definition(path: Path) -> None:
    """Another machine's disk."""
    registry.add(with_disk("db", path))


def by_hard_link(path: Path) -> None:
    """Another machine's disk under another name."""
    os.link(path, path.with_name("other.vhd"))
    registry.add(with_disk("db", path.with_name("other.vhd")))


def by_link(path: Path) -> None:
    """Another machine's disk, through a symbolic link."""
    path.with_name("link.vhd").symlink_to(path)
    registry.add(with_disk("db", path.with_name("link.vhd")))


def by_own_definition(path: Path) -> None:
    """The machine's own disk, whatever the caller read earlier."""
    with registry.standing_still():
        machine = registry.load("web")
        Path(machine.paths.definition).write_bytes(with_disk("web", path).changed(id=machine.spec.id).to_json())


def by_running_definition(path: Path) -> None:
    """The definition that a machine runs with, while the stored one does not name the image yet."""
    machine = registry.load("web")
    os.makedirs(machine.runtime.folder)
    Path(machine.runtime.running).write_bytes(with_disk("web", path).to_json())


def by_own_snapshot(path: Path) -> None:
    """A snapshot of the machine itself."""
    write_tree(registry.load("web"), Tree({_ID: snapshot_on(path)}, _ID, {str(path): Image(None, ours=True)}))


def by_snapshot(path: Path) -> None:
    """A snapshot of another machine."""
    write_tree(registry.add(make_spec(name="db")), Tree({_ID: snapshot_on(path)}, _ID, {}))


def by_journal(path: Path) -> None:
    """An operation of another machine that is in progress."""
    write_tree(registry.add(make_spec(name="db")), Tree(journal=MergeOff("/x.vhd", (str(path),))))


def by_backup(path: Path) -> None:
    """A backup in progress, whose child takes the machine's writes."""
    note = {"disk-0": {"frozen": "/x.vhd", "child": str(path)}}
    Path(registry.load("web").paths.folder, "backup.json").write_text(json.dumps(note))


def by_damaged_machine(path: Path) -> None:
    """A machine that cannot be read, whose file contains the image's name."""
    Path(registry.add(with_disk("db", path)).paths.definition).write_text('{"disks": "/x/a.vhd"')


@pytest.mark.parametrize(
    "needed",
    [by_definition, by_hard_link, by_link, by_own_definition, by_running_definition, by_own_snapshot, by_snapshot,
     by_journal, by_backup, by_damaged_machine],
)  # fmt: skip
def test_an_image_with_a_name_in_a_record_stays(folder: Path, lock: HeldLock, needed: Callable[[Path], None]) -> None:
    """An image that any record names stays, and the error says which one. INV-REMOVED-UNUSED."""
    image = folder / "a.vhd"
    needed(image)
    with pytest.raises(InUse, match=r"is not removed: .*(db|web)"):
        remove_image(str(image), lock)
    assert image.exists()


def test_an_unnamed_image_is_removed(folder: Path, lock: HeldLock) -> None:
    """An image that nothing names is removed, although the tree remembers it, and another machine elsewhere is
    damaged; a missing one is accepted."""
    image = folder / "a.vhd"
    write_tree(registry.load("web"), Tree(images={str(image): Image(None, ours=True)}))
    Path(registry.add(make_spec(name="db")).paths.definition).write_text("{")
    remove_image(str(image), lock)
    assert not image.exists()
    remove_image(str(image), lock)


def test_an_image_open_in_this_process_stays(folder: Path, lock: HeldLock) -> None:
    """An image that is served or mounted stays, even where locks are off."""
    image = folder / "a.vhd"
    for options in (vhdkit.OpenOptions(), vhdkit.OpenOptions(lock=False)):
        with vhdkit.open_disk(image, writable=True, options=options):
            with pytest.raises(InUse, match=rf"the process {os.getpid()} \(.*\) has it open"):
                remove_image(str(image), lock)
            assert image.exists()
    remove_image(str(image), lock)
    assert not image.exists()


def test_an_image_open_in_another_process_stays(folder: Path, lock: HeldLock) -> None:
    """The error names the process, under whatever name it opened the file."""
    image = folder / "a.vhd"
    os.link(image, folder / "other.vhd")
    code = "import sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "other.vhd")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"open\n"
            with pytest.raises(InUse, match=f"the process {process.pid} "):
                remove_image(str(image), lock)
        finally:
            process.kill()
    assert image.exists()


def test_an_image_locked_by_a_hidden_process_stays(
    folder: Path, lock: HeldLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock like QEMU's is enough: another user's descriptors cannot be listed."""
    image = folder / "a.vhd"
    monkeypatch.setattr("vmm.store.removal._pids", list)
    descriptor = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        one_byte = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, one_byte)
        with pytest.raises(InUse, match="holds a lock on it"):
            remove_image(str(image), lock)
    finally:
        os.close(descriptor)
    remove_image(str(image), lock)
    assert not image.exists()


def test_a_folder_with_another_machines_snapshot(folder: Path, lock: HeldLock) -> None:
    """A folder that contains another machine's snapshot or disk is refused; the machine's own is accepted."""
    by_own_snapshot(folder / "a.vhd")
    refuse_needed_folder(str(folder / "snaps" / _ID), lock)
    shutil.copytree(registry.load("web").paths.folder, folder / "home" / "machines" / "db")
    with pytest.raises(InUse, match="the snapshot first of db needs"):
        refuse_needed_folder(str(folder / "snaps" / _ID), lock)


def test_an_image_under_a_loop_device_stays(folder: Path, lock: HeldLock) -> None:
    """INV-REMOVED-UNUSED: a loop device made on another name of the image, which has since been removed, keeps the
    image."""
    other_name = folder / "other.vhd"
    os.link(folder / "a.vhd", other_name)
    with loop_device(other_name) as device:
        other_name.unlink()
        with pytest.raises(InUse, match=f"the loop device {device} stands on it"):
            remove_image(str(folder / "a.vhd"), lock)
    assert (folder / "a.vhd").exists()
