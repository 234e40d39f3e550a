# SPDX-License-Identifier: Apache-2.0
"""What the reader of a page has and a test lacks: a disk with files, an installed guest, an interrupted merge.

Each function gets the folder in which the page's commands are run, which is also the current folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import vhdkit
from tests.harness.killing import killed_at
from tests.mounting import require_fuse
from tests.support import (
    require_boot_sector_guest,
    require_nbdkit,
    require_qemu,
    require_root_and_namespaces,
    require_tool,
    run,
)
from tests.vhdkit.backup.repositories import Nights
from tests.vmm.guests import boot_sector
from tests.vmm.net.machines import Namespaces
from vmm.api.manager import DiskRequest, Manager
from vmm.api.scheduled_backups import make_backup_schedule
from vmm.schedule import store

MIB = 1 << 20
_PARTITION = (MIB, 16 * MIB)  # its beginning, its size


def repository(folder: Path) -> None:
    """A repository with two nights of a machine, the newest of them taken just now."""
    if not (folder / "backup").exists():
        nights = Nights(folder / "backup")
        for number in range(2):
            nights.add({"disk-0": {number: b"x"}}, taken=datetime.now(UTC).replace(microsecond=0))


def repository_of_a_disk(folder: Path) -> None:
    """The same in place of what is there: nights with nothing but a disk."""
    shutil.rmtree(folder / "backup", ignore_errors=True)
    repository(folder)


def machines_to_back_up(folder: Path) -> None:
    """The machines "web" and "mail", each with a disk, which are in no repository yet."""
    for name in ("web", "mail"):
        vhdkit.create_image(folder / f"{name}-0.vhd", 16 * MIB)
        Manager().create(name, memory_bytes=64 * MIB, disks=[DiskRequest(str(folder / f"{name}-0.vhd"))])


def no_repository(folder: Path) -> None:
    """The nights of the disk are gone, so that those of machines can be in a folder of that name."""
    shutil.rmtree(folder / "backup", ignore_errors=True)


def schedule(folder: Path) -> None:
    """The schedule "nightly" of the machine "web", as the command adds it, but for its timer."""
    work = {"machines": ["web"], "repository": str(folder / "machines"), "keep": {"daily": 7}, "sample_percent": 5}
    store.add(make_backup_schedule(work, name="nightly", when="22:30", created=datetime.now(UTC)))


def require_all() -> None:
    """The programs that the README's commands need."""
    require_fuse()
    require_nbdkit()
    require_boot_sector_guest()
    for tool in ("mke2fs", "debugfs", "sfdisk"):
        require_tool(tool)


def require_networks() -> None:
    """The programs that a page about networks needs."""
    require_root_and_namespaces()
    require_qemu()
    for tool in ("nft", "dnsmasq", "ping"):
        require_tool(tool)


def _raw_with_files(path: Path, size_bytes: int) -> None:
    """A raw disk with one partition, in which a file system has `hello.txt`."""
    start, length = _PARTITION
    files = path.with_suffix(".files")
    files.mkdir()
    (files / "hello.txt").write_text("hello\n")
    with path.open("xb") as raw:
        raw.truncate(size_bytes)
    table = f"label: dos\nstart={start // 512}, size={length // 512}, type=83\n"
    subprocess.run([require_tool("sfdisk"), "-q", path], input=table, text=True, check=True, capture_output=True)
    offset = f"offset={start}"
    run([require_tool("mke2fs"), "-q", "-t", "ext4", "-d", files, "-E", offset, path, str(length // 1024)])
    shutil.rmtree(files)


def _copy_into(raw: Path, image: str) -> None:
    """Write the difference to the raw disk into the disk, as a guest would have."""
    page_bytes = 4096
    with vhdkit.open_disk(image, writable=True) as disk, raw.open("rb") as file:
        for offset in range(0, min(disk.size_bytes, raw.stat().st_size), page_bytes):
            page = file.read(page_bytes)
            if page != disk.read(offset, len(page)):
                disk.write(offset, page)


def partition_on_disk(folder: Path) -> None:
    """`disk.vhd` has a partition with a file system."""
    raw = folder / "stand-in.raw"
    _raw_with_files(raw, 20 * MIB)
    _copy_into(raw, "disk.vhd")
    raw.unlink()


def disk_for_filters(folder: Path) -> None:
    """A `disk.vhd` with a partition."""
    vhdkit.create_image("disk.vhd", 64 * MIB)
    partition_on_disk(folder)


def interrupted_merge(folder: Path) -> None:
    """A child of `child.avhd` whose merge into it was killed in the middle."""
    vhdkit.create_child("half-merged.avhd", "child.avhd")
    with vhdkit.open_disk("half-merged.avhd", writable=True) as disk:
        disk.write(40 * MIB, b"newer")
    for number in range(6, 60):
        assert killed_at(number, lambda: vhdkit.merge("half-merged.avhd")), "the merge ran to its end"
        if (folder / ".child.avhd.vhdkit-merge").exists():
            return


def moved_base(folder: Path) -> None:
    """The base has been moved."""
    (folder / "bases").mkdir()
    os.rename("disk.vhd", "bases/disk.vhd")


def install_guest(image: str, text: bytes = boot_sector.READ_TEXT) -> None:
    """Put the boot-sector guest on the disk: it counts, obeys the power button, and prints the text when it starts."""
    with vhdkit.open_disk(image, writable=True) as disk:
        boot_sector.install(disk, boot_sector.BootOptions(print_every=4), text=text)


def installed_guest(folder: Path) -> None:
    """An installer's disc, and a system on `web.vhd`, as if it had been installed from it."""
    (folder / "debian-12-netinst.iso").write_bytes(bytes(MIB))
    install_guest("web.vhd")


def week(folder: Path) -> None:
    """The demo's chain: the weather of three days."""
    raw = folder / "stand-in.raw"
    with raw.open("xb") as file:
        file.truncate(8 * MIB)
    run([require_tool("mke2fs"), "-q", "-t", "ext4", raw])
    debugfs = require_tool("debugfs")
    days = (("base.vhd", "sunny"), ("monday.avhd", "clouds on Monday"), ("tuesday.avhd", "rain since Tuesday"))
    below = ""
    for image, weather in days:
        (folder / "weather.txt").write_text(f"{weather}\n")
        if below:
            run([debugfs, "-w", "-R", "rm weather.txt", raw])
            vhdkit.create_child(image, below)
        else:
            vhdkit.create_image(image, 8 * MIB)
        run([debugfs, "-w", "-R", "write weather.txt weather.txt", raw])
        _copy_into(raw, image)
        below = image
    raw.unlink()


def for_programs(folder: Path) -> None:
    """What the programs of a page open: a chain, and a disk for a machine."""
    for name in ("below.vhd", "child.avhd", "db.vhd"):
        (folder / name).unlink(missing_ok=True)
    vhdkit.create_image("below.vhd", 8 * MIB)
    vhdkit.create_child("child.avhd", "below.vhd")
    vhdkit.create_image("db.vhd", 8 * MIB)
    install_guest("db.vhd")


def chain_to_mount(folder: Path) -> None:
    """`child.avhd` of 20 GiB, and an empty folder `mnt`."""
    vhdkit.create_image("base.vhd", 20 << 30)
    vhdkit.create_child("child.avhd", "base.vhd")
    (folder / "mnt").mkdir()


def _running_machine(image: str) -> Manager:
    """A small running machine `web` with the guest on its disk."""
    vhdkit.create_image(image, 64 * MIB)
    install_guest(image)
    manager = Manager()
    manager.create("web", disks=[DiskRequest(image)], memory_bytes=64 * MIB)
    manager.start("web")
    return manager


def running_machine(folder: Path) -> None:
    """A small running machine `web`."""
    _running_machine("web.vhd")


def machine_with_branches(folder: Path) -> None:
    """Another machine replaces `web`: with the tree of snapshots that the page shows."""
    manager = Manager()
    manager.delete("web", with_snapshots=True)
    snapshots = _running_machine("web-2.vhd").snapshots("web")
    snapshots.create("clean", notes="installed")
    snapshots.create("update")
    manager.stop("web")
    snapshots.create("tests pass")
    snapshots.apply("clean", discard_current=True)


def talking_machine(folder: Path) -> None:
    """A running machine `web` whose guest prints a login prompt."""
    vhdkit.create_image("web.vhd", 64 * MIB)
    with vhdkit.open_disk("web.vhd", writable=True) as disk:
        boot_sector.install(disk, text=b"web login:")
    Manager().create("web", disks=[DiskRequest("web.vhd")], memory_bytes=64 * MIB)
    Manager().start("web")


def disk_for_networks(folder: Path) -> None:
    """`web.vhd`."""
    vhdkit.create_image("web.vhd", 64 * MIB)


def installer(folder: Path) -> None:
    """`installer.iso`, `drivers.iso`, and a system on `web.vhd`, as if it had been installed from the first."""
    for name in ("installer.iso", "drivers.iso"):
        (folder / name).write_bytes(bytes(MIB))
    install_guest("web.vhd")


def host_with_card(spaces: Namespaces) -> str:
    """A namespace with a card `eth0`, and another one behind it with a gateway."""
    here, there = spaces.add("docs"), spaces.add("docs-lan")
    spaces.run(here, f"ip link add eth0 type veth peer name lan0 netns {there}")
    spaces.run(there, "ip addr add 10.9.0.254/24 dev lan0 && ip link set lan0 up")
    spaces.run(here, "ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up")
    spaces.run(here, "ip route add default via 10.9.0.254; ping -c 1 -w 10 10.9.0.254")
    return here
