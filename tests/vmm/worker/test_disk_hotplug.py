# SPDX-License-Identifier: Apache-2.0
"""Disks that are added, removed and grown under a running Linux, and the disk server killed while it writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import vhdkit
from tests.support import require_linux_guest
from tests.vmm.guests import linux
from tests.vmm.guests.shell import GuestShell
from tests.vmm.small_guests import make_machine, processes, wait_counting, wait_whole
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import InUse, InvalidSpec, NotFound, StoreFailed, VmmError, WrongState

pytestmark = pytest.mark.kvm
MIB = 1 << 20
NAME = "linux"
# A disk's name in the guest, found by its serial; waits for it to appear.
FIND = (
    "for n in $(seq 100); do for d in /sys/block/*; do "
    "grep -qs {0} $d/serial $d/device/vpd_pg80 && basename $d && exit; done; usleep 50000; done; exit 1"
)


def start_linux(manager: Manager, *wishes: DiskRequest) -> GuestShell:
    """Start a Linux with these disks; return its shell."""
    guest = require_linux_guest()
    manager.create(
        NAME, memory_bytes=int(linux.MEMORY) * MIB, accelerator="tcg", kernel=str(guest.kernel),
        initrd=str(guest.initrd), append=guest.append, disks=wishes,
    )  # fmt: skip
    manager.start(NAME)
    link = manager.guest(NAME).open_console().link
    shell = GuestShell(link)
    shell.wait_ready()
    return shell


def child_of_new_base(folder: Path, name: str, size_bytes: int) -> Path:
    """An empty NAME.avhd on NAME.vhd."""
    vhdkit.create_image(folder / f"{name}.vhd", size_bytes)
    vhdkit.create_child(folder / f"{name}.avhd", folder / f"{name}.vhd")
    return folder / f"{name}.avhd"


def test_disks_are_added_grown_and_removed_under_linux(manager: Manager, tmp_path: Path) -> None:
    """A SCSI disk is added, written to, grown while the guest watches, and removed; everything written is there."""
    leaf = child_of_new_base(tmp_path, "data", 32 * MIB)
    with start_linux(manager) as shell:
        added = manager.add_disk(NAME, DiskRequest(str(leaf), serial="HOTPLUG"))
        assert (added.id, added.place) == ("disk-0", "scsi0:0")
        device = shell.check(FIND.format("HOTPLUG"))
        assert shell.check(f"cat /sys/block/{device}/size") == str(32 * MIB // 512)
        digest = shell.check(
            f"dd if=/dev/urandom of=/tmp/x bs=1M count=8 2>/dev/null; "
            f"dd if=/tmp/x of=/dev/{device} bs=1M seek=4 conv=fsync 2>/dev/null; sha256sum </tmp/x"
        ).split()[0]
        assert manager.resize_disk(NAME, "disk-0", 64 * MIB) == 64 * MIB
        size = shell.check(
            f"for n in $(seq 100); do test $(cat /sys/block/{device}/size) = {64 * MIB // 512} && break; "
            f"echo 1 >/sys/block/{device}/device/rescan; usleep 50000; done; cat /sys/block/{device}/size"
        )
        assert size == str(64 * MIB // 512)
        shell.check(f"echo behind | dd of=/dev/{device} bs=1M seek=63 conv=fsync 2>/dev/null")
        assert [one.disk.id for one in manager.disks(NAME)] == ["disk-0"]
        assert manager.remove_disk(NAME, "HOTPLUG").id == "disk-0"
        shell.check(f"! test -e /sys/block/{device}")
        with vhdkit.open_disk(leaf, writable=True) as disk:  # free already, while the machine runs
            assert hashlib.sha256(disk.read(4 * MIB, 8 * MIB)).hexdigest() == digest
            assert disk.read(63 * MIB, 7) == b"behind\n"
        assert manager.disks(NAME) == ()
        manager.add_disk(NAME, DiskRequest(str(leaf)))
    manager.stop(NAME)
    assert [one.code for one in vhdkit.check(leaf)] == ["chain-size"]  # larger than its parent, as requested


def test_a_virtio_disk_grows_under_linux(manager: Manager, tmp_path: Path) -> None:
    """The guest sees the new size at once, and what it writes beyond the old end is in the chain."""
    leaf = child_of_new_base(tmp_path, "data", 32 * MIB)
    with start_linux(manager, DiskRequest(str(leaf), controller="virtio", serial="GROWS")) as shell:
        device = shell.check(FIND.format("GROWS"))
        for size in (48 * MIB, 64 * MIB):  # the second time with a connection that was made for the first
            assert manager.resize_disk(NAME, "disk-0", size) == size
            look = f"cat /sys/block/{device}/size"
            shell.check(
                f"for n in $(seq 100); do test $({look}) = {size // 512} && exit 0; usleep 50000; done; exit 1"
            )
            shell.check(f"echo behind | dd of=/dev/{device} bs=1M seek={size // MIB - 1} conv=fsync 2>/dev/null")
        with pytest.raises(WrongState, match="can be shrunk only"):
            manager.resize_disk(NAME, "disk-0", 32 * MIB, shrink=True)
    manager.stop(NAME)
    with vhdkit.open_disk(leaf) as disk:
        assert disk.size_bytes == 64 * MIB
        assert disk.read(47 * MIB, 7) == disk.read(63 * MIB, 7) == b"behind\n"


@pytest.mark.parametrize("controller", ["scsi", pytest.param("virtio", marks=pytest.mark.nightly)])
def test_server_killed_while_the_guest_writes(manager: Manager, tmp_path: Path, controller: str) -> None:
    """After three kills of the disk server under O_DIRECT writes, the guest reads back what it wrote."""
    leaf = child_of_new_base(tmp_path, "data", 64 * MIB)
    with start_linux(manager, DiskRequest(str(leaf), controller=controller, serial="DATA")) as shell:  # type: ignore[arg-type]
        device = shell.check(FIND.format("DATA"))
        shell.check("dd if=/dev/urandom of=/tmp/x bs=1M count=4 2>/dev/null")
        write = f"dd if=/tmp/x of=/dev/{device} bs=64k oflag=direct 2>/dev/null"
        shell.check(f"(while ! test -e /tmp/stop; do {write}; done; {write}; touch /tmp/done) >/dev/null 2>&1 &")
        for _ in range(3):
            victim = processes(NAME)["server"]
            victim.kill()
            wait_whole(NAME, but={"server": victim})
        shell.check("touch /tmp/stop; while ! test -e /tmp/done; do usleep 50000; done")
        wanted = shell.check("sha256sum </tmp/x")
        read = f"dd if=/dev/{device} bs=1M count=4 iflag=direct 2>/dev/null | sha256sum"
        assert shell.check(f"echo 3 >/proc/sys/vm/drop_caches; {read}") == wanted
    manager.stop(NAME)
    with vhdkit.open_disk(leaf) as disk:
        assert hashlib.sha256(disk.read(0, 4 * MIB)).hexdigest() == wanted.split()[0]
    # A block whose write had not been answered when the server was killed was begun again elsewhere.
    assert [one for one in vhdkit.check(leaf) if one.code != "leaked-space"] == []


def test_changes_that_a_running_machine_refuses(manager: Manager, tmp_path: Path) -> None:
    """The refusal says what to do instead; nothing changes."""
    leaf = make_machine(manager, tmp_path)
    other = child_of_new_base(tmp_path, "other", 8 * MIB)
    manager.start("small")
    before = manager.disks("small")
    with pytest.raises(WrongState, match="on ide can be added only"):
        manager.add_disk("small", DiskRequest(str(other), controller="ide"))
    with pytest.raises(WrongState, match="on ide can be added only") as refused:
        manager.add_disk("small", DiskRequest(str(leaf), kind="iso"))
    assert "vmm disk change" in str(refused.value) and "scsi" not in str(refused.value)
    with pytest.raises(WrongState, match="controller 3"):
        manager.add_disk("small", DiskRequest(str(other), controller="scsi", controller_index=3))
    with pytest.raises(InvalidSpec, match="IDE"):
        manager.add_disk("small", DiskRequest(str(other), kind="iso", controller="scsi"))
    with pytest.raises(WrongState, match="on ide can be removed only"):
        manager.remove_disk("small", "disk-0")
    with pytest.raises(NotFound, match="its disks: disk-0"):
        manager.remove_disk("small", "disk-9")
    with pytest.raises(WrongState, match="on ide can be enlarged only"):
        manager.resize_disk("small", "disk-0", 16 * MIB)
    with pytest.raises(InUse, match="twice"):
        manager.add_disk("small", DiskRequest(str(leaf)))
    with pytest.raises(NotFound, match="the image does not exist"):
        manager.add_disk("small", DiskRequest(str(tmp_path / "absent.vhd")))
    with vhdkit.open_disk(other, writable=True), pytest.raises(InUse, match="another program"):
        manager.add_disk("small", DiskRequest(str(other)))
    assert manager.disks("small") == before
    manager.add_disk("small", DiskRequest(str(other)))
    for shrink in (False, True):
        with pytest.raises(WrongState, match="can be shrunk only"):
            manager.resize_disk("small", "disk-1", 1 * MIB, shrink=shrink)
    wait_counting(manager)


def test_disks_of_a_machine_that_is_off(manager: Manager, tmp_path: Path) -> None:
    """They can be added anywhere, resized, and removed by image; the list shows what is wrong with a disk."""
    leaf = make_machine(manager, tmp_path)
    other = child_of_new_base(tmp_path, "other", 8 * MIB)
    assert manager.add_disk("small", DiskRequest(str(other), controller="virtio")).place == "virtio0:0"
    assert manager.resize_disk("small", "disk-1", 16 * MIB) == 16 * MIB
    with pytest.raises(StoreFailed, match="--shrink"):
        manager.resize_disk("small", "disk-1", 12 * MIB)
    assert manager.resize_disk("small", "disk-1", 12 * MIB, shrink=True) == 12 * MIB
    assert manager.resize_disk("small", "disk-1", 16 * MIB) == 16 * MIB
    other.with_suffix(".vhd").rename(tmp_path / "gone.vhd")
    rows = manager.disks("small")
    assert [(one.disk.id, one.size_bytes) for one in rows] == [("disk-0", 8 * MIB), ("disk-1", None)]
    assert "parent" in str(rows[1].problem)
    with pytest.raises(VmmError, match="parent"):
        manager.start("small")
    assert manager.remove_disk("small", str(other)).id == "disk-1"
    assert [one.disk.path for one in manager.disks("small")] == [str(leaf)]
