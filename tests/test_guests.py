# SPDX-License-Identifier: Apache-2.0
"""The guests for tests do what they promise."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support import require_boot_sector_guest, require_kvm, require_linux_guest, require_qemu, require_tool
from tests.vmm.guests import boot_sector, launch, linux, linux_disk
from tests.vmm.guests.boot_sector import COUNT_LBA, SECTOR, WRITE_LBA, BootOptions
from tests.vmm.guests.shell import GuestShell

pytestmark = pytest.mark.kvm


def sector(path: Path, index: int) -> bytes:
    """One sector of a raw image."""
    return path.read_bytes()[index * SECTOR :][:SECTOR]


@pytest.mark.parametrize("controller", ["ide", "scsi", "virtio"])
def test_boots_reads_writes_and_powers_off(tmp_path: Path, controller: str) -> None:
    """It reads its text, writes its sector and ends QEMU, from any controller."""
    qemu = require_boot_sector_guest()
    disk = tmp_path / "disk.raw"
    boot_sector.write_raw_disk(disk, BootOptions(power_off_at_once=True))
    with launch.running(qemu, tmp_path, *launch.drive(disk, controller)) as guest:
        with launch.connect(guest.serial) as serial:
            said = launch.read_until(serial, b"power off")
        assert guest.wait() == 0
    assert [line.strip() for line in said.split(b"\n")][:4] == [
        b"BOOT-OK",
        boot_sector.READ_TEXT,
        b"WRITE-OK",
        b"power off",
    ]
    assert sector(disk, WRITE_LBA).rstrip(b"\0") == boot_sector.WRITTEN_TEXT


def test_counts_and_obeys_keys(tmp_path: Path) -> None:
    """It prints ticks, writes the counter at each n-th and on request, answers keys, resets and powers off."""
    qemu = require_boot_sector_guest()
    disk = tmp_path / "disk.raw"
    boot_sector.write_raw_disk(disk, BootOptions(print_every=2, write_every=4))
    with launch.running(qemu, tmp_path, *launch.drive(disk, "virtio")) as guest:
        with launch.connect(guest.serial) as serial:
            assert b"tick 1\r\n" not in launch.read_until(serial, b"tick 6\r\n")
            assert int.from_bytes(sector(disk, COUNT_LBA)[:4], "little") >= 4
            for key, answer in (b"x", b"key x\r\n"), (b"d", boot_sector.READ_TEXT), (b"c", b"count "):
                serial.sendall(key)
                launch.read_until(serial, answer)
            serial.sendall(b"x" * 99 + b"h")  # more than its port can hold at once: nothing is lost
            assert launch.read_until(serial, b"halted").count(b"key x") == 99
            guest.monitor("system_reset")
            launch.read_until(serial, b"READY\r\n")
            serial.sendall(b"w")
            launch.read_until(serial, b"written ")
            serial.sendall(b"r")
            launch.read_until(serial, b"READY\r\n")
            serial.sendall(b"p")
            launch.read_until(serial, b"power off")
        assert guest.wait() == 0


@pytest.mark.nightly  # every day a machine with a worker runs it under KVM (tests/vmm/worker/test_capture.py)
def test_runs_under_kvm(tmp_path: Path) -> None:
    """The processor itself runs it, if it can."""
    qemu = require_boot_sector_guest()
    require_kvm()
    disk = tmp_path / "disk.raw"
    boot_sector.write_raw_disk(disk)
    words = launch.drive(disk, "virtio")
    with launch.running(qemu, tmp_path, *words, accelerator="kvm") as guest:
        with launch.connect(guest.serial) as serial:
            launch.read_until(serial, b"READY\r\n")
            serial.sendall(b"p")
            launch.read_until(serial, b"power off")
        assert guest.wait() == 0


@pytest.mark.parametrize("obeys", [True, False])
def test_power_button(tmp_path: Path, obeys: bool) -> None:
    """ACPI's power button ends it, unless it is configured to ignore it."""
    qemu = require_boot_sector_guest()
    disk = tmp_path / "disk.raw"
    boot_sector.write_raw_disk(disk, BootOptions(power_button=obeys))
    with launch.running(qemu, tmp_path, *launch.drive(disk, "ide")) as guest, launch.connect(guest.serial) as serial:
        launch.read_until(serial, b"READY\r\n")
        guest.monitor("system_powerdown")
        if obeys:
            launch.read_until(serial, b"power button")
            assert guest.wait() == 0
        else:
            time.sleep(0.3)  # the time in which it would obey
            serial.sendall(b"c")
            assert b"power" not in launch.read_until(serial, b"count ")


def linux_words() -> list[str]:
    """The command line for a Linux guest that is booted without a disk."""
    guest = require_linux_guest()
    return ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", guest.append]


def test_linux_shell(tmp_path: Path) -> None:
    """Commands run inside, with their exit codes and output, large or binary; it powers off by ACPI."""
    words = linux_words()
    with (
        launch.running(require_qemu(), tmp_path, *words, memory=linux.MEMORY) as guest,
        GuestShell(guest.serial) as shell,
    ):
        shell.wait_ready()
        assert shell.check("uname -s") == "Linux"
        assert shell.run("echo to both; echo errors >&2; exit 7").exit_code == 7
        assert shell.run("echo to both; echo errors >&2; exit 7").output == "to both\nerrors\n"
        assert len(shell.check("seq 1 20000")) == len("\n".join(map(str, range(1, 20001))))
        shell.send("cd /proc; value=5")
        shell.send('echo "typed: $PWD $value" >/dev/console')
        assert shell.run("true").exit_code == 0
        assert b"typed: /proc 5" in shell.transcript
        guest.monitor("system_powerdown")
        assert guest.wait() == 0


# Every day a machine with a worker boots it from virtio (tests/vmm/api/test_guest_access.py).
@pytest.mark.nightly
@pytest.mark.parametrize("controller", ["ide", "scsi", "virtio"])
def test_linux_disk_boots(tmp_path: Path, controller: str) -> None:
    """The Linux guest's disk boots by itself from any controller, and its file system can be used."""
    require_linux_guest()
    require_tool("mke2fs")
    disk = tmp_path / "disk.raw"
    linux_disk.write_raw_disk(disk)
    words = launch.drive(disk, controller)
    with (
        launch.running(require_qemu(), tmp_path, *words, memory=linux_disk.MEMORY) as guest,
        GuestShell(guest.serial) as shell,
    ):
        shell.wait_ready()
        shell.check("mount $(findfs LABEL=guest) /mnt && echo kept >/mnt/file && sync && umount /mnt")
        shell.send("poweroff -f")
        assert guest.wait() == 0
    assert b"kept\n" in disk.read_bytes()
