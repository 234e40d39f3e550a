# SPDX-License-Identifier: Apache-2.0
"""A Linux guest that writes and checks what it wrote, through snapshots, live merges, a cancelled one, and killed
workers."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.support import daily_or_nightly, require_linux_guest
from tests.vmm.guests import linux
from tests.vmm.guests.launch import connect
from tests.vmm.guests.shell import GuestShell
from tests.vmm.small_guests import MIB, processes, wait_whole
from tests.vmm.snapshots.machines import Machines
from tests.waiting import wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import VmmError
from vmm.processes.worker_connection import MachineRef
from vmm.store import registry
from vmm.store.snapshots.store import load_tree, read_merging
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm

# Writes pages of known content at random places with fsync, and reads each back past the cache; a bad one is reported.
_VERIFY = """
n=0
while [ ! -e /run/stop ]; do
  n=$((n+1)); place=$((n * 7919 % 3000))
  yes "page $n" | dd of=/dev/vda bs=4k count=1 seek=$place iflag=fullblock conv=notrunc,fsync 2>/dev/null
  [ "$(dd if=/dev/vda bs=4k count=1 skip=$place iflag=direct 2>/dev/null | head -n 1)" = "page $n" ] || {
    echo "lost page $n" >/run/lost; exit 1; }
  echo $n >/run/new; mv /run/new /run/done  # never empty
done
"""


with_large_sectors = pytest.mark.parametrize("shell_of", ["vhdx"], indirect=True)


@pytest.fixture
def shell_of(manager: Manager, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[], GuestShell]]:
    """A running Linux machine "small" with its own disk; gives shells in it. A VHDX has sectors of 4096 bytes."""
    guest, path = require_linux_guest(), tmp_path / f"disk.{getattr(request, 'param', 'vhd')}"
    if path.suffix == ".vhdx":
        vhdkit.create_image(path, 16 * MIB, disk_format="vhdx", block_size_bytes=MIB, sector_bytes=4096)
    else:
        vhdkit.create_image(path, 16 * MIB, block_size_bytes=512 << 10)
    manager.create(
        "small", disks=[DiskRequest(str(path), controller="virtio")], accelerator="tcg",
        memory_bytes=int(linux.MEMORY) * MIB, kernel=str(guest.kernel), initrd=str(guest.initrd),
        append=guest.append, background_capture=True,
    )  # fmt: skip
    manager.start("small")
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(shell("small"))
    for machine in registry.load_all()[0]:
        if (merging := read_merging(machine.paths)) is not None:
            merging.ref.kill()


def shell(name: str) -> GuestShell:
    """The guest's shell, over the machine's console."""
    link = connect(Path(MachineRef.of(name).runtime.console))  # a new worker needs a moment until it listens
    link.sendall(json.dumps({"type": "take", "scrollback": 0}).encode() + b"\n")
    while link.recv(1) != b"\n":
        pass
    opened = GuestShell(link)
    opened.wait_ready(120)
    return opened


def rounds(guest: GuestShell) -> int:
    """The number of rounds that the writer has done; fails if it lost something."""
    assert guest.run("cat /run/lost").exit_code != 0, "the guest did not read what it had written"
    return int(guest.check("cat /run/done 2>/dev/null || echo 0"))


def goes_on(guest: GuestShell) -> None:
    """Wait until the writer has written more."""
    before = rounds(guest)
    wait_until(lambda: rounds(guest) > before + 1, "the guest continues writing")


def writes(guest: GuestShell) -> None:
    """Start the writer, and wait until it has written something."""
    guest.check(f"cat >/run/verify <<'END'\n{_VERIFY}\nEND\n(sh /run/verify &)".replace("\n\n", "\n"))
    goes_on(guest)


@pytest.mark.nightly
@with_large_sectors
def test_a_guest_with_large_sectors(manager: Manager, shell_of: Callable[[], GuestShell], tmp_path: Path) -> None:
    """A guest sees a VHDX with sectors of 4096 bytes as such a disk, on virtio and, added while it runs, on SCSI; what
    it writes survives snapshots, the death of the disk server and a live merge; and it returns to a snapshot."""
    guest, machines, small = shell_of(), Machines(tmp_path, "vhdx"), manager.snapshots("small")
    writes(guest)
    size = daily_or_nightly(1 << 30, 64 << 40)
    vhdkit.create_image(tmp_path / "large.vhdx", size, disk_format="vhdx", sector_bytes=4096)
    assert manager.add_disk("small", DiskRequest(str(tmp_path / "large.vhdx"))).controller == "scsi"
    wait_until(lambda: guest.run("test -b /dev/sda").exit_code == 0, "the guest sees the new disk")
    for disk in ("vda", "sda"):
        sizes = guest.check(f"cd /sys/block/{disk}/queue; cat logical_block_size physical_block_size")
        assert sizes.split() == ["4096", "4096"]
    last_page = size // 4096 - 1
    guest.check(f"yes far | dd of=/dev/sda bs=4k count=1 seek={last_page} iflag=fullblock conv=fsync")
    small.create("first")
    kept = machines.of_snapshot("small", "first")["disk-0"]
    for name in ("second", "third"):
        goes_on(guest)
        small.create(name)
    before = processes()
    before["server"].send(signal.SIGKILL)
    wait_whole(but={"server": before["server"]})
    goes_on(guest)
    for name in ("second", "third"):
        small.delete(name)
    assert [one.problem for one in small.merge_live()] == [None] * 2 and small.merges_due() == 0
    goes_on(guest)
    assert guest.check(f"dd if=/dev/sda bs=4k count=1 skip={last_page} iflag=direct 2>&- | head -n 1") == "far"
    assert machines.of_snapshot("small", "first")["disk-0"] == kept
    manager.stop("small")
    small.apply("first", discard_current=True)
    assert machines.now("small")["disk-0"] == kept
    manager.start("small")
    goes_on(shell_of())
    manager.stop("small")
    small.delete("first")
    small.merge()
    assert machines.images() == {"disk.vhdx", "large.vhdx"} and not small.tree().images


@pytest.mark.parametrize("shell_of", ["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)], indirect=True)
def test_a_writing_guest_is_not_affected(manager: Manager, shell_of: Callable[[], GuestShell], tmp_path: Path) -> None:
    """By snapshots (one with frozen file systems), live merges, a cancelled one, and a worker killed during one."""
    guest, machines, small = shell_of(), Machines(tmp_path), manager.snapshots("small")
    writes(guest)
    guest.check("echo before >/run/era")
    before_first = rounds(guest)
    first = small.create("first", consistent=True)
    assert first.consistent and first.mode == "background"
    guest.check("echo after >/run/era")
    for name in ("second", "third", "fourth"):
        goes_on(guest)
        small.create(name)
    kept = machines.of_snapshot("small", "first")
    small.delete("third")
    assert [one.problem for one in small.merge_live()] == [None]
    goes_on(guest)

    small.delete("fourth")
    small.delete("second")
    failed: list[VmmError] = []

    def merge() -> None:
        try:
            small.merge_live(max_rate_bytes=20_000)
        except VmmError as error:
            failed.append(error)

    merging = threading.Thread(target=merge)
    merging.start()
    wait_until(small.cancel_merge, "it is cancelled", 60)
    merging.join(60)
    assert failed and failed[0].exit_code == 130
    goes_on(guest)

    merging = threading.Thread(target=merge)
    merging.start()
    wait_until(lambda: load_tree(registry.load("small").paths).journal is not None, "it merges")
    before = processes()
    before["worker"].send(signal.SIGKILL)
    merging.join(60)
    wait_whole(but={"worker": before["worker"]})
    guest = shell_of()
    goes_on(guest)

    def followed() -> bool:
        small.cancel_merge()  # if the server is still working on it
        return load_tree(registry.load("small").paths).journal is None

    wait_until(followed, "the new worker followed it", 60)
    small.merge_live()
    assert small.merges_due() == 0 and machines.of_snapshot("small", "first") == kept
    goes_on(guest)

    small.apply("first", discard_current=True)
    manager.start("small")
    guest = shell_of()
    assert guest.check("cat /run/era") == "before" and rounds(guest) >= before_first
    goes_on(guest)
    guest.check("touch /run/stop; sleep 1; sync")
    manager.shutdown("small")
    assert manager.state("small") is MachineState.OFF and machines.of_snapshot("small", "first") == kept
    now = machines.now("small")
    small.delete("first")
    small.merge()
    assert machines.now("small") == now and not small.tree().images
