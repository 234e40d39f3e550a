# SPDX-License-Identifier: Apache-2.0
"""The inside of running machines, with real workers and guests: disks, console, screen, agent, data exchange."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.pictures import read_png
from tests.support import require_boot_sector_guest, require_linux_guest, require_tool
from tests.vmm.guests import boot_sector, linux, linux_disk
from tests.vmm.guests.boot_sector import SECTOR, WRITE_LBA, BootOptions
from tests.vmm.guests.launch import read_until
from tests.vmm.guests.shell import GuestShell
from tests.vmm.stage import SECONDS
from tests.waiting import wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import AgentUnavailable, NotFound, TimedOut, WrongState
from vmm.model.guest import ExchangedItem
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm
MIB = 1 << 20


def boot_machine(manager: Manager, folder: Path, options: BootOptions | None = None, **settings: Any) -> Path:
    """The machine `web`: the boot-sector guest in a child of a base image; returns the child's path."""
    require_boot_sector_guest()
    base, leaf = folder / "base.vhd", folder / "leaf.avhd"
    vhdkit.create_image(base, 16 * MIB)
    with vhdkit.open_disk(base, writable=True) as disk:
        boot_sector.install(disk, options)
    vhdkit.create_child(leaf, base)
    manager.create("web", memory_bytes=16 * MIB, accelerator="tcg", disks=[DiskRequest(str(leaf))], **settings)
    return leaf


def linux_machine(manager: Manager, *, is_started: bool = True, **settings: Any) -> None:
    """The machine `web`: the Linux guest, booted without a disk."""
    guest = require_linux_guest()
    manager.create(
        "web", memory_bytes=int(linux.MEMORY) * MIB, accelerator="tcg",
        kernel=str(guest.kernel), initrd=str(guest.initrd), append=guest.append, **settings,
    )  # fmt: skip
    if is_started:
        manager.start("web")


def shell_of(manager: Manager) -> GuestShell:
    """The Linux guest's shell, over the console's hub."""
    console = manager.guest("web").open_console()
    link, may_type = console.link, console.may_type
    assert may_type
    shell = GuestShell(link)
    shell.wait_ready()
    return shell


def wait_off(manager: Manager) -> None:
    """Wait until the machine is off by itself."""
    wait_until(lambda: manager.state("web") is MachineState.OFF, "the machine ends", SECONDS)


def hash_of(path: Path) -> str:
    """The hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- disks ----------------------------------------------------------------------------------------------------------


def test_boots_from_a_chain_and_writes_to_its_leaf(manager: Manager, tmp_path: Path) -> None:
    """Linux boots from a differencing chain; at the end, what it has synced is in the leaf, and the layers below are
    unchanged."""
    require_linux_guest()
    require_tool("mke2fs")
    raw, base, middle, leaf = (tmp_path / name for name in ("d.raw", "base.vhd", "middle.avhd", "leaf.avhd"))
    linux_disk.write_raw_disk(raw)
    vhdkit.convert(raw, base, vhdkit.DiskFormat.DYNAMIC)
    vhdkit.create_child(middle, base)
    vhdkit.create_child(leaf, middle)
    before = hash_of(base), hash_of(middle)
    # (From IDE it takes half a minute: the BIOS reads it sector by sector. The boot-sector guest boots from there.)
    manager.create(
        "web", memory_bytes=int(linux_disk.MEMORY) * MIB, accelerator="tcg",
        disks=[DiskRequest(str(leaf), controller="virtio")],
    )  # fmt: skip
    manager.start("web")
    content = os.urandom(300)
    with shell_of(manager) as shell:
        shell.check("mount $(findfs LABEL=guest) /mnt")
        shell.check(f"echo {base64.b64encode(content).decode()} | base64 -d >/mnt/file && sync /mnt/file")
        assert shell.check("sha256sum </mnt/file").split()[0] == hashlib.sha256(content).hexdigest()
        # Not a clean end: synced data must be there all the same.
    manager.stop("web")
    assert (hash_of(base), hash_of(middle)) == before
    with vhdkit.open_disk(leaf) as disk:
        assert content in disk.read(0, disk.size_bytes)
        owners = {extent.layer_index for extent in disk.extents()}
        assert {0, 2} <= owners, "the leaf has the new sectors, the base the old ones"
    with vhdkit.open_disk(middle) as disk:
        assert content not in disk.read(0, disk.size_bytes)


def test_every_controller_writes_with_fsync(manager: Manager, tmp_path: Path) -> None:
    """Chains on IDE, SCSI and virtio are found by their serials; synced writes and discards are in the right leaf."""
    disks = {}
    for controller in ("ide", "scsi", "virtio"):
        base, leaf = tmp_path / f"{controller}.vhd", tmp_path / f"{controller}.avhd"
        vhdkit.create_image(base, 8 * MIB)
        with vhdkit.open_disk(base, writable=True) as disk:
            disk.write(4 * MIB, f"base of {controller}".encode() * 100)
        vhdkit.create_child(leaf, base)
        disks[controller] = leaf
    before = {controller: hash_of(leaf.with_suffix(".vhd")) for controller, leaf in disks.items()}
    wishes = [DiskRequest(str(leaf), controller=name, serial=f"SERIAL{name}") for name, leaf in disks.items()]  # type: ignore[arg-type]
    linux_machine(manager, disks=wishes)
    with shell_of(manager) as shell:
        for controller in disks:
            # virtio disks show their serial in sysfs, SCSI and IDE disks in their own pages.
            device = shell.check(
                f"for d in /sys/block/[sv]d*; do cat $d/serial $d/device/vpd_pg80 2>/dev/null | "
                f"grep -qa SERIAL{controller} && echo /dev/${{d##*/}}; done; true"
            )
            assert device.count("/dev/") == 1, f"{controller}: {device!r}"
            assert shell.check(f"dd if={device} bs=1M skip=4 count=1 2>/dev/null | head -c 12").startswith("base of")
            shell.check(f"printf 'written on {controller}' | dd of={device} bs=512 seek=2 conv=fsync,notrunc")
    manager.stop("web")
    for controller, leaf in disks.items():
        assert hash_of(leaf.with_suffix(".vhd")) == before[controller]
        with vhdkit.open_disk(leaf) as disk:
            assert disk.read(1024, 64).startswith(f"written on {controller}".encode())


def test_a_saved_guest_continues(manager: Manager, tmp_path: Path) -> None:
    """After save and start a counter in memory continues where it was, and the disk's writes are there."""
    leaf = boot_machine(manager, tmp_path)
    before = hash_of(tmp_path / "base.vhd")
    manager.start("web")
    link = manager.guest("web").open_console().link
    with link:
        read_until(link, b"READY\r\n")
        counted = wait_until(lambda: (now := _count(link)) >= 5 and now, "it counts", SECONDS)
    manager.save("web")
    assert manager.state("web") is MachineState.SAVED
    with vhdkit.open_disk(leaf) as disk:
        assert disk.read(WRITE_LBA * SECTOR, 20) == boot_sector.WRITTEN_TEXT
    assert hash_of(tmp_path / "base.vhd") == before
    manager.start("web")
    link = manager.guest("web").open_console(scrollback_bytes=0).link
    with link:
        again = _count(link)
        assert counted <= again < counted + 1000
        assert _count(link) >= again
    manager.stop("web")
    assert manager.guest("web").console_log().count(b"BOOT-OK") == 1, "it booted again instead of continuing"


def _count(link: socket.socket) -> int:
    """The counter that the boot-sector guest reports."""
    link.sendall(b"c")
    said = read_until(link, b"count ").rpartition(b"count ")[2]
    while not said.endswith(b"\r\n"):
        said += read_until(link, b"\n")
    return int(said)


# -- agent and exchange -----------------------------------------------------------------------------------------------


def test_services_that_are_switched_off(manager: Manager) -> None:
    """A service that is switched off is refused, and the guest does not even see its channel."""
    off = {"heartbeat": False, "shutdown": False, "time_sync": False, "key_value": False, "backup": False}
    linux_machine(manager, integration=off)
    guest = manager.guest("web")
    with shell_of(manager) as shell:
        assert shell.run("ls /dev/virtio-ports/*").exit_code != 0
        assert manager.show("web").heartbeat == "off"
        for ask in guest.ping, guest.info, guest.freeze, guest.set_time, guest.items:
            with pytest.raises(AgentUnavailable, match="switched off"):
                ask()
    manager.shutdown("web", timeout_seconds=SECONDS)  # through the power button
    (event,) = [event for event in manager.events("web") if event.name == "shutdown-requested"]
    assert event.details["by"] == "power button"


def check_agent(manager: Manager, shell: GuestShell) -> None:
    """The agent of a running guest answers, sets the clock, freezes and thaws."""
    guest = manager.guest("web")
    wait_until(lambda: manager.show("web").heartbeat == "ok", "it has a heartbeat", SECONDS, pause=0.1)
    assert guest.ping().state == "ok"
    inside = manager.show("web", guest=True).guest
    assert inside is not None and inside.os is not None and inside.os.name == "vmm test guest"
    system = guest.info().os
    assert system is not None and system.host_name == "vmm-guest"
    guest.set_time()
    shell.check("date -s @1000000000")
    manager.pause("web")
    manager.resume("web")
    shell.check("while test $(date +%s) -lt 1700000000; do usleep 50000; done")
    assert guest.freeze(30.0) >= 0
    with pytest.raises(AgentUnavailable, match="already"):
        guest.freeze()
    assert guest.thaw() >= 0
    guest.freeze(0.1)
    time.sleep(0.5)  # longer than it may be frozen
    with pytest.raises(TimedOut, match="before the work was done"):
        guest.thaw()


def test_agent_and_exchange(manager: Manager) -> None:
    """`show` has heartbeat, system and addresses; frozen file systems thaw; the agent shuts the guest down.

    Items set while the machine is off reach the guest; items pass both ways, and survive the machine's end.
    """
    linux_machine(manager, is_started=False)
    guest = manager.guest("web")
    assert guest.items() == {"guest": {}, "host": {}}
    assert guest.set_item("while", "off") is False
    assert guest.set_item("gone", "soon") is False
    assert guest.delete_item("gone") is False
    manager.start("web")
    with shell_of(manager) as shell:
        answer = shell.check("kvp set role database")  # answered after the items that the guest received first
        assert answer == '{"id":1,"ok":true}'
        assert shell.check("cat /run/kvp/host/while") == "off"
        assert shell.run("cat /run/kvp/host/gone").exit_code != 0
        assert guest.get_item("role") == ExchangedItem("database", "guest")
        assert guest.set_item("colour", "blue") is True
        assert shell.check("cat /run/kvp/host/colour") == "blue"
        assert guest.set_item("say", 'a "quoted" \\ word') is True
        assert shell.check("cat /run/kvp/host/say") == 'a "quoted" \\ word'
        assert '"value":"database"' in shell.check("kvp list guest")
        assert '"value":"off"' in shell.check("kvp get while")
        refused = shell.run("kvp get nothing")
        assert refused.exit_code != 0 and "has no item" in refused.output
        assert guest.delete_item("say") is True
        assert shell.run("cat /run/kvp/host/say").exit_code != 0
        check_agent(manager, shell)
    manager.shutdown("web", timeout_seconds=SECONDS)
    assert manager.state("web") is MachineState.OFF
    (event,) = [event for event in manager.events("web") if event.name == "shutdown-requested"]
    assert event.details["by"] == "agent"
    assert guest.items() == {"guest": {"role": "database"}, "host": {"colour": "blue", "while": "off"}}
    with pytest.raises(NotFound):
        guest.delete_item("role")  # the guest's own


# -- console and screen -----------------------------------------------------------------------------------------------


def test_console_survives_the_worker(manager: Manager, tmp_path: Path) -> None:
    """After the worker was killed the console is available again, with its earlier output, and keys reach the
    guest."""
    boot_machine(manager, tmp_path)
    manager.start("web")
    guest = manager.guest("web")
    link = guest.open_console().link
    with link:
        read_until(link, b"READY\r\n")
        pids = manager.show("web").pids
        assert pids is not None
        os.kill(pids["worker"], 9)
        while link.recv(4096):
            pass
    manager.show("web")  # waits until there is another worker
    console = guest.open_console()
    with console.link as link:
        assert console.may_type
        read_until(link, b"READY\r\n")
        link.sendall(b"k")
        read_until(link, b"key k\r\n")
    manager.stop("web")
    assert not guest.has_console()
    assert guest.console_log().endswith(b"key k\r\n")


def test_the_console_misses_nothing_at_the_start(manager: Manager, tmp_path: Path) -> None:
    """The console has the guest's output from the very first byte, however fast it was."""
    boot_machine(manager, tmp_path, BootOptions(power_off_at_once=True))
    manager.start("web")
    wait_off(manager)
    lines = manager.guest("web").console_log().split(b"\r\n")
    assert lines[0].startswith(b"[vmm: started ")
    assert lines[1:3] == [b"BOOT-OK", boot_sector.READ_TEXT]


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_screen(manager: Manager, tmp_path: Path, firmware: str) -> None:
    """A picture of the screen from a QEMU that may not open files: BIOS text, or what UEFI drew."""
    if firmware == "uefi" and not Path("/usr/share/OVMF").is_dir():
        require_tool("ovmf")
    boot_machine(manager, tmp_path, firmware=firmware)
    if firmware == "uefi":
        manager.set("web", memory_bytes=128 * MIB)
    manager.start("web")
    guest = manager.guest("web")
    colours = 2 if firmware == "bios" else 3
    wait_until(lambda: read_png(guest.screen()).colour_count >= colours, "the screen is drawn", 2 * SECONDS, pause=0.3)
    picture = read_png(guest.screen())
    assert (guest.picture().width, guest.picture().height) == (picture.width, picture.height)
    assert picture.width >= 640 and picture.height >= 400
    assert 0 < picture.share_of_other_than((0, 0, 0)) < 0.5
    assert Path(guest.vnc_socket()).is_socket()
    manager.stop("web")
    with pytest.raises(WrongState, match="is off"):
        guest.screen()


def test_no_screen(manager: Manager, tmp_path: Path) -> None:
    """A machine without a screen reports that, and runs normally."""
    boot_machine(manager, tmp_path, screen=False)
    manager.start("web")
    with pytest.raises(WrongState, match="no screen"):
        manager.guest("web").screen()
    with pytest.raises(WrongState, match="no screen"):
        manager.guest("web").vnc_socket()
    manager.stop("web")
