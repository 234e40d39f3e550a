# SPDX-License-Identifier: Apache-2.0
"""Machines with devices and LUNs: a guest boots from one and writes to it, and no other program can."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.support import require_root, require_tool
from tests.vmm.guests import boot_sector
from tests.vmm.kvm.loops import MIB, loop_device
from tests.vmm.kvm.targets import iscsi_target
from tests.vmm.kvm.test_passthrough import assert_untouchable
from tests.vmm.kvm.test_trial import require_kvm
from tests.vmm.small_guests import (
    console,
    last_tick,
    make_disk,
    processes,
    wait_counting,
    wait_whole,
)
from tests.waiting import wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import AccessDenied, InUse, InvalidSpec, NotFound, QemuFailed, Refused, VmmError
from vmm.model.spec import make_disk as disk_spec
from vmm.model.spec import make_spec
from vmm.store import devices
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm
TINY: dict[str, Any] = {"memory_bytes": 16 * MIB, "accelerator": "tcg"}


def bootable(path: Path, *, write_every: int = 0) -> Path:
    """A raw file of 16 MiB that boots the small guest."""
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    options = vhdkit.OpenOptions(format_name=vhdkit.FormatName.RAW)
    with vhdkit.open_disk(path, writable=True, options=options) as disk:
        boot_sector.install(disk, boot_sector.BootOptions(print_every=4, write_every=write_every))
    return path


def given(path: str, **more: Any) -> DiskRequest:
    """A request for a device or LUN."""
    return DiskRequest(path, kind="pass-through", **more)


@pytest.mark.parametrize(
    ("controller", "accelerator"),
    [("ide", "tcg"), ("virtio", "tcg"), pytest.param("virtio", "kvm", marks=pytest.mark.nightly)],
)
def test_guest_boots_from_a_device(controller: str, accelerator: str, manager: Manager, tmp_path: Path) -> None:
    """The guest boots from the device and its writes are on it; in the meantime the host can do nothing to it."""
    if accelerator == "kvm":
        require_kvm()
    file = bootable(tmp_path / "device.raw")
    with loop_device(file) as device:
        wish = given(device, controller=controller)
        # Without a screen: a KVM that emulates takes long over a VGA BIOS.
        manager.create("small", disks=[wish], **{**TINY, "accelerator": accelerator, "screen": False})
        manager.start("small")
        wait_until(lambda: last_tick(manager), "the guest counts", seconds=200)
        assert "WRITE-OK" in console(manager)
        assert_untouchable_but_swap(device, tmp_path)
        manager.stop("small")
    sector = boot_sector.WRITE_LBA * boot_sector.SECTOR
    assert file.read_bytes()[sector:].startswith(boot_sector.WRITTEN_TEXT)


def assert_untouchable_but_swap(device: str, point: Path) -> None:
    """Like `assert_untouchable`, for a device that is not swap space."""
    try:
        assert_untouchable(device, point)
    except AssertionError as error:
        assert "swapon" in str(error), error


def test_claim_outlives_the_worker(manager: Manager, tmp_path: Path) -> None:
    """INV-DEVICE-CLAIMED: worker and supervisor are killed; the device stays claimed until the machine is off."""
    with loop_device(bootable(tmp_path / "device.raw")) as device:
        manager.create("small", disks=[given(device)], **TINY)
        manager.start("small")
        before = processes()
        for part in ("worker", "keeper"):
            os.kill(before[part].pid, signal.SIGKILL)
            with pytest.raises(OSError, match="busy"):
                os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
            wait_whole(but={part: before[part]})
        wait_counting(manager)
        manager.stop("small")
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))


def test_device_of_another_machine(manager: Manager, tmp_path: Path) -> None:
    """A device belongs to one machine, even while that is off; after it was removed another machine can have it."""
    make_disk(tmp_path, "one")
    with loop_device(tmp_path / "device.raw") as device:
        manager.create(
            "one", disks=[DiskRequest(str(tmp_path / "one.avhd")), given(device, controller="scsi")], **TINY
        )
        with pytest.raises(InUse, match="belongs to the machine one"):
            manager.create("two", disks=[given(device)], **TINY)
        assert manager.names() == ["one"]
        manager.remove_disk("one", "disk-1")
        manager.create("two", disks=[given(device)], **TINY)


def test_a_loop_device_on_another_machines_image(manager: Manager, tmp_path: Path) -> None:
    """A loop device on an image of another machine is refused."""
    leaf = make_disk(tmp_path, "one")
    manager.create("one", disks=[DiskRequest(str(leaf))], **TINY)
    with loop_device(leaf) as device, pytest.raises(InUse, match="a disk of the machine one"):
        manager.create("two", disks=[given(device)], **TINY)


def test_a_loop_device_on_a_hard_link_is_the_same_image(manager: Manager, tmp_path: Path) -> None:
    """A loop device on another name of a machine's image is that image: it is refused as a device and as an image."""
    leaf = make_disk(tmp_path, "one")
    manager.create("one", disks=[DiskRequest(str(leaf))], **TINY)
    other_name = tmp_path / "elsewhere" / "data.raw"
    other_name.parent.mkdir()
    os.link(leaf, other_name)
    with loop_device(other_name) as device:
        with pytest.raises(InUse, match="a disk of the machine one"):
            manager.create("two", disks=[given(device)], **TINY)
        other_name.unlink()  # the device still holds it
        with pytest.raises(InUse, match="a disk of the machine one"):
            manager.create("two", disks=[given(device)], **TINY)
    assert manager.names() == ["one"]


@pytest.mark.parametrize("own", [False, True], ids=["another", "itself"])
def test_a_loop_device_on_a_parent_of_a_disk(manager: Manager, tmp_path: Path, own: bool) -> None:
    """A loop device on a parent of a machine's disk is refused, under each of the parent's names."""
    leaf = make_disk(tmp_path, "one")
    manager.create("one", disks=[DiskRequest(str(leaf))], **TINY)
    other_name = tmp_path / "elsewhere.raw"
    os.link(leaf.with_suffix(".vhd"), other_name)
    with loop_device(other_name) as device, pytest.raises(InUse, match="on which a disk of the machine one stands"):
        if own:
            manager.add_disk("one", given(device))
        else:
            manager.create("two", disks=[given(device)], **TINY)
    assert manager.names() == ["one"] and len(manager.disks("one")) == 1


def test_a_file_behind_a_passed_through_device_is_not_an_image(manager: Manager, tmp_path: Path) -> None:
    """A file behind a machine's device cannot be another machine's image, under any of its names."""
    file = tmp_path / "data.raw"
    with loop_device(file) as device:
        manager.create("one", disks=[given(device)], **TINY)
        os.link(file, tmp_path / "other.raw")
        with pytest.raises(InUse, match="one"):
            manager.create("two", disks=[DiskRequest(str(tmp_path / "other.raw"))], **TINY)


def test_paths_that_cannot_be_passed_through(manager: Manager, tmp_path: Path) -> None:
    """A file, a folder, /dev/null, a missing path and malformed URLs are refused when the machine is defined."""
    (tmp_path / "file").write_bytes(bytes(4096))
    for path in (str(tmp_path / "file"), str(tmp_path), "/dev/null", "iscsi://san/x", "iscsi://san/iqn.2001-04.a:b/x"):
        with pytest.raises(InvalidSpec):
            manager.create("small", disks=[given(path)], **TINY)
    with pytest.raises(NotFound):
        manager.create("small", disks=[given(str(tmp_path / "none"))], **TINY)
    assert manager.names() == []


def test_a_device_that_is_in_use_at_the_start(manager: Manager, tmp_path: Path) -> None:
    """A device that was free when the machine was defined may be in use at its start: the start fails and says why."""
    with loop_device(bootable(tmp_path / "device.raw")) as device:
        manager.create("small", disks=[given(device)], **TINY)
        holder = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(InUse, match=device):
                manager.start("small")
            assert manager.state("small") is MachineState.OFF
        finally:
            os.close(holder)
        manager.start("small")
        manager.stop("small")
    with pytest.raises(NotFound, match="is gone"):
        manager.start("small")


def test_a_device_under_another_name(manager: Manager, tmp_path: Path) -> None:
    """INV-DEVICE-IDENTITY: the device has another number later; the machine finds it, and no other device."""
    file = bootable(tmp_path / "device.raw")
    with loop_device(file) as first:
        manager.create("small", disks=[given(first)], **TINY)
    with loop_device(tmp_path / "other.raw"), loop_device(file):
        manager.start("small")
        wait_counting(manager)
        manager.stop("small")
    assert not any((tmp_path / "other.raw").read_bytes())


def test_a_device_is_plugged_in_and_out_of_a_running_machine(manager: Manager, tmp_path: Path) -> None:
    """A device is added to a running machine on SCSI and claimed; unplugged, it belongs to the host again."""
    leaf = make_disk(tmp_path)
    manager.create("small", disks=[DiskRequest(str(leaf))], **TINY)
    manager.start("small")
    with loop_device(tmp_path / "device.raw") as device:
        for _ in range(2):
            disk = manager.add_disk("small", given(device))
            assert disk.controller == "scsi" and disk.identity == f"file={tmp_path}/device.raw"
            with pytest.raises(OSError, match="busy"):
                os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
            manager.remove_disk("small", disk.id)
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    with pytest.raises(Refused, match="no file behind it"):
        manager.add_disk("small", given(device))
    assert [one.disk.id for one in manager.disks("small")] == ["disk-0"]
    manager.stop("small")


def test_a_failed_plug_in_leaves_nothing(manager: Manager, tmp_path: Path) -> None:
    """With a place that QEMU does not have, the device is released, and the machine has no such disk."""
    leaf = make_disk(tmp_path)
    manager.create("small", disks=[DiskRequest(str(leaf))], **TINY)
    manager.start("small")
    with loop_device(tmp_path / "device.raw") as device:
        with pytest.raises(VmmError, match="SCSI controller 3"):
            manager.add_disk("small", given(device, controller="scsi", controller_index=3, unit=0))
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    assert len(manager.disks("small")) == 1
    manager.stop("small")


def test_a_read_only_device(manager: Manager, tmp_path: Path) -> None:
    """A guest with a read-only device cannot write to it."""
    file = bootable(tmp_path / "device.raw")
    before = file.read_bytes()
    with loop_device(file) as device:
        manager.create("small", disks=[given(device, controller="virtio", read_only=True)], **TINY)
        manager.start("small")
        wait_until(lambda: "BOOT-OK" in console(manager), "the guest boots")
        manager.stop("small")
    assert file.read_bytes() == before


def test_saved_memory_and_a_device(manager: Manager, tmp_path: Path) -> None:
    """Saved memory is restored if the device is unchanged, and refused if the host wrote to it in the meantime."""
    with loop_device(bootable(tmp_path / "device.raw")) as device:
        manager.create("small", disks=[given(device)], **TINY)
        manager.start("small")
        wait_counting(manager)
        manager.save("small")
        manager.start("small")
        wait_counting(manager)
        manager.save("small")
        with open(device, "r+b") as raw:
            raw.seek(8 * MIB)
            raw.write(b"x" * 4096)
            raw.flush()
            os.fsync(raw.fileno())
        with pytest.raises(Refused, match="was changed since"):
            manager.start("small")
        manager.start("small", discard_saved=True)
        wait_counting(manager)
        manager.stop("small")


def test_guest_boots_from_a_lun(manager: Manager, tmp_path: Path) -> None:
    """The guest boots from a LUN, and its writes are in the target's file; no other machine gets that LUN."""
    with iscsi_target(tmp_path / "lun") as target:
        bootable(target.file)
        manager.create("small", disks=[given(target.url)], **TINY)
        manager.start("small")
        wait_counting(manager)
        with pytest.raises(InUse, match="belongs to the machine small"):
            manager.create("other", disks=[given(target.url.replace("127.0.0.1", "localhost"))], **TINY)
        with pytest.raises(NotFound, match="the target has no such LUN"):
            manager.create("other", disks=[given(target.url[:-1] + "7")], **TINY)
        manager.stop("small")
        sector = boot_sector.WRITE_LBA * boot_sector.SECTOR
        assert target.file.read_bytes()[sector:].startswith(boot_sector.WRITTEN_TEXT)


def test_saved_memory_and_a_lun(manager: Manager, tmp_path: Path) -> None:
    """Saved memory is restored if the LUN is unchanged, and refused if another host wrote to it in the meantime."""
    require_tool("qemu-io")
    with iscsi_target(tmp_path / "lun") as target:
        bootable(target.file)
        manager.create("small", disks=[given(target.url)], **TINY)
        manager.start("small")
        wait_counting(manager)
        manager.save("small")
        manager.start("small")
        wait_counting(manager)
        manager.save("small")
        with target.file.open("r+b") as file:
            file.seek(MIB)
            file.write(b"written by another host")
        with pytest.raises(Refused, match="was changed since"):
            manager.start("small")
        manager.start("small", discard_saved=True)
        manager.stop("small")
        assert not [one for one in manager.events("small") if one.name == "saved-disk-not-compared"]


def test_the_password_of_a_lun(manager: Manager, tmp_path: Path) -> None:
    """QEMU logs in with the password from the file, which is on no command line; a wrong one is refused, and so is a
    file that others can read."""
    require_root()
    secret = tmp_path / "password"
    secret.write_text("twelve-letters\n")
    secret.chmod(0o600)
    leaf = make_disk(tmp_path)
    with iscsi_target(tmp_path / "lun", user="me", password="twelve-letters") as target:
        url = target.url.replace("//", "//me@", 1) + f"?password-file={secret}"
        manager.create("small", disks=[DiskRequest(str(leaf)), given(url, controller="scsi")], **TINY)
        manager.start("small")
        for ref in processes().values():
            assert b"twelve-letters" not in Path(f"/proc/{ref.pid}/cmdline").read_bytes()
        manager.remove_disk("small", "disk-1")
        manager.add_disk("small", given(url))
        manager.stop("small")
        secret.chmod(0o640)
        with pytest.raises(Refused, match="chmod 600"):
            manager.start("small")
        secret.chmod(0o600)
        secret.write_text("something-else\n")
        with pytest.raises(QemuFailed, match=r"disk-1: .*log in: the user or the password is wrong"):
            manager.start("small")
        with pytest.raises(Refused, match="the user or the password is wrong"):
            manager.add_disk("small", given(url.replace("/1?", "/7?")))
    with pytest.raises(QemuFailed, match=r"disk-1: .*cannot be reached"):
        manager.start("small")


def test_a_target_that_goes_away(manager: Manager, tmp_path: Path) -> None:
    """While the target is down the guest waits for it, sees no error, and continues where it was when it is back."""
    with iscsi_target(tmp_path / "lun") as target:
        bootable(target.file, write_every=4)
        manager.create("small", disks=[given(target.url)], **TINY)
        manager.start("small")
        wait_counting(manager)
        target.kill()
        wait_standing_still(manager)
        target.start()
        wait_counting(manager)
        assert "ERROR" not in console(manager)
        manager.stop("small")


def wait_standing_still(manager: Manager) -> None:
    """Wait until the guest, which writes its counter, has not continued for two seconds."""
    seen, since = last_tick(manager), time.monotonic()
    deadline = since + 60
    while time.monotonic() - since < 2:
        assert time.monotonic() < deadline, "the guest continues without its disk"
        time.sleep(0.1)  # it must have counted nothing for two seconds
        if last_tick(manager) != seen:
            seen, since = last_tick(manager), time.monotonic()


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 256])
def test_files_without_a_password(content: bytes, tmp_path: Path) -> None:
    """An empty first line and one that is too long are refused."""
    path = tmp_path / "password"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(Refused, match="must have a password"):
        devices.read_password(str(path))


def test_a_missing_password_file(tmp_path: Path) -> None:
    """The error names the missing file, or the folder in its place."""
    with pytest.raises(NotFound):
        devices.read_password(str(tmp_path / "none"))
    with pytest.raises((AccessDenied, VmmError)):
        devices.read_password(str(tmp_path))


def test_the_longest_password(tmp_path: Path) -> None:
    """A password of the maximum length, and one with another system's line end, are read."""
    path = tmp_path / "password"
    path.touch(0o600)
    for content, password in ((b"x" * 255, b"x" * 255), (b"abc\r\nsecond line", b"abc")):
        path.write_bytes(content)
        assert devices.read_password(str(path)) == password


def test_no_snapshots_with_passed_through_disks() -> None:
    """Machines with a device or LUN are refused the verbs that need a layer of ours under every disk; other machines
    are not."""
    chain = disk_spec(id="disk-0", path="/images/a.vhd")
    device = disk_spec(id="disk-1", kind="pass-through", path="/dev/sdb", unit=1)
    devices.refuse_passed_through(make_spec(name="web", disks=[chain]), "a snapshot")
    with pytest.raises(Refused, match=r"a snapshot cannot contain: disk-1 \(/dev/sdb\).*disk remove web disk-1"):
        devices.refuse_passed_through(make_spec(name="web", disks=[chain, device]), "a snapshot")
