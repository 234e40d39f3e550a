# SPDX-License-Identifier: Apache-2.0
"""What the supervisor does after a disk server has ended."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import vhdkit
import vmm
from tests.support import require_tool
from tests.vmm.snapshots.machines import Machines
from vmm.host.proc import Lock, python_command, python_environment
from vmm.kvm import program
from vmm.model.errors import NoSpace, StoreFailed, VmmError, from_document
from vmm.model.paths import RuntimePaths
from vmm.processes.supervisor import last_error_in
from vmm.store import registry


@pytest.mark.parametrize(
    ("log", "status", "kind", "words"),
    [
        (
            '{"error": {"problem": "is damaged", "path": "/a.vhd", "exit_code": 3}}',
            3,
            StoreFailed,
            "/a.vhd: is damaged",
        ),
        ("", 7, NoSpace, "no space"),
        ("", 1, StoreFailed, "ended with code 1"),
        ("", -9, StoreFailed, "SIGKILL"),
        ("", None, StoreFailed, "ended"),
    ],
)
def test_why_a_disk_server_ended(
    tmp_path: Path, log: str, status: int | None, kind: type[VmmError], words: str
) -> None:
    """Its own words give the reason; without them its exit status does, and a full file system is found even if it
    wrote nothing."""
    (tmp_path / "log").write_text(log)
    error = from_document(last_error_in(str(tmp_path / "log"), status))
    assert type(error) is kind and words in str(error)


def test_a_supervisor_that_starts_too_late(tmp_path: Path) -> None:
    """One that a dead worker had started leaves the folder of the machine's next start alone, and does not lock it."""
    runtime = RuntimePaths(str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    Path(runtime.running).write_text('{"disks": []}')
    command = python_command("vmm.processes.supervisor", str(tmp_path), runtime.folder)
    subprocess.run(command, env=python_environment(), check=True, timeout=60)
    assert os.listdir(runtime.folder) == [os.path.basename(runtime.running)]


def test_a_lock_in_a_folder_that_was_replaced(tmp_path: Path) -> None:
    """A lock stops being valid when its folder is removed, and does not become valid again with a new folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock = Lock(str(folder / "keeper.lock"))
    assert not lock.is_current() and lock.try_take() and lock.is_current()
    shutil.rmtree(folder)
    assert not lock.is_current()
    folder.mkdir()
    (folder / "keeper.lock").touch()
    assert not lock.is_current()
    lock.release()


def test_a_machine_does_not_start_on_a_disk_with_other_sectors(machines: Machines) -> None:
    """An image that was replaced by one with another sector size is refused; adding it again makes it a disk."""
    require_tool("qemu-system-x86_64")
    program.find()
    image = machines.folder / "disk.vhdx"
    vhdkit.create_image(image, 4 << 20, disk_format="vhdx")
    manager = vmm.Manager()
    manager.create("m", disks=[vmm.DiskRequest(str(image), controller="virtio")], firmware="uefi")
    vhdkit.create_image(image, 4 << 20, disk_format="vhdx", sector_bytes=4096, replace=True)
    with pytest.raises(vmm.VmmError, match="has sectors of 4096 bytes, and not of 512") as refusal:
        manager.start("m")
    assert refusal.value.hint is not None and refusal.value.hint.count("vmm disk ") == 2
    assert manager.state("m") is vmm.MachineState.OFF
    manager.remove_disk("m", "disk-0")
    manager.add_disk("m", vmm.DiskRequest(str(image)))
    assert registry.load("m").spec.disks[0].sector_bytes == 4096
