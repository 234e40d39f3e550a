# SPDX-License-Identifier: Apache-2.0
"""The Linux guest: Debian's cloud kernel, our initial RAM file system, and a disk that boots them by itself.

The kernel package is downloaded with apt once, unpacked into the cache and never installed. The file system holds
busybox, the kernel's modules for QEMU's disks, network cards and virtio devices, qemu's guest agent with its libraries
(the system's own), random_read.S for benchmarks, and the scripts of linux_root/. From then on no network is needed.

    guest = linux_guest()
    qemu-system-x86_64 -m 192 -kernel guest.kernel -initrd guest.initrd -append guest.append ...

`python -m tests.vmm.guests.linux` makes it and prints where its parts are; script/setup does so.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.vmm.guests.cpio import Archive
from tests.vmm.guests.tools import GuestUnavailable, kept, run, tool

MEMORY = "192"  # MiB that it needs, with some to spare
APPEND = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check random.trust_cpu=on"
    " cryptomgr.notests"  # the kernel's tests of its ciphers are a tenth of its boot
)
_METAPACKAGE = "linux-image-cloud-amd64"
# Loaded at the start, with their dependencies.
_MODULES = (
    "virtio_pci", "virtio_blk", "virtio_scsi", "virtio_console", "ata_piix", "sd_mod", "sr_mod",
    "virtio_net", "button", "evdev", "virtio_balloon", "virtio-rng",
)  # fmt: skip
# Available on request: `modprobe NAME`.
_MORE_MODULES = ("8021q", "isofs", "vfat", "nls_cp437", "nls_ascii", "xfs", "af_packet_diag", "virtiofs")
_ROOT = Path(__file__).with_name("linux_root")
_PLACES = {
    "init": "init",
    "shell-agent": "bin/shell-agent",
    "kvp-agent": "bin/kvp-agent",
    "shutdown": "sbin/shutdown",
    "dhcp-event": "usr/share/udhcpc/default.script",
}
_RANDOM_READ = Path(__file__).with_name("random_read.S")
_OS_RELEASE = 'NAME="vmm test guest"\nID=vmm-test-guest\nVERSION_ID=1\nPRETTY_NAME="vmm test guest 1"\n'


@dataclass(frozen=True)
class LinuxGuest:
    """What QEMU needs to boot it."""

    kernel: Path
    initrd: Path
    append: str = APPEND


@cache
def linux_guest() -> LinuxGuest:
    """The guest, made if it is not in the cache. Raises GuestUnavailable if it cannot be made."""
    kernel = _kernel_folder()
    busybox, agent = Path(tool("busybox", "busybox-static")), Path(tool("qemu-ga", "qemu-guest-agent"))
    sources = [path.read_bytes() for path in (*sorted(_ROOT.iterdir()), _RANDOM_READ, Path(__file__), busybox, agent)]
    folder = kept("initrd", [kernel.name, *sources], lambda new: _make_initrd(new, kernel, busybox, agent))
    return LinuxGuest(kernel / "vmlinuz", folder / "initrd")


def _kernel_folder() -> Path:
    """`vmlinuz` and `modules/` from Debian's package, downloaded if it is not in the cache."""

    def make(folder: Path) -> None:
        unpack, downloader = tool("dpkg-deb", "dpkg"), tool("apt-get", "apt")
        depends = run([tool("apt-cache", "apt"), "depends", "--important", _METAPACKAGE])
        found = re.search(r"Depends: (linux-image-\S+)", depends)
        if found is None:
            raise GuestUnavailable(f"apt knows no {_METAPACKAGE}: the Linux guest is made on Debian")
        download = folder / "download"
        download.mkdir()
        run([downloader, "-q", "download", found[1]], cwd=download)
        (package,) = download.glob("*.deb")
        run([unpack, "-x", package, folder / "unpacked"])
        (kernel,) = (folder / "unpacked" / "boot").glob("vmlinuz-*")
        kernel.rename(folder / "vmlinuz")
        (modules,) = (folder / "unpacked" / "lib" / "modules").iterdir()
        (modules / "kernel").rename(folder / "modules")
        for path in sorted([*download.rglob("*"), *(folder / "unpacked").rglob("*")], reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        download.rmdir()
        (folder / "unpacked").rmdir()

    return kept("kernel", [_METAPACKAGE], make)


def _make_initrd(folder: Path, kernel: Path, busybox: Path, agent: Path) -> None:
    archive = Archive()
    for name in ("bin", "sbin", "dev", "proc", "sys", "run", "tmp", "mnt", "etc", "var"):
        archive.folder(name)
    archive.device("dev/console", 5, 1)  # init's own standard output
    archive.file("bin/busybox", busybox.read_bytes(), executable=True)
    for applet in run([busybox, "--list"]).split():
        if applet != "busybox":
            archive.link(f"bin/{applet}", "busybox")
    for name, place in _PLACES.items():
        archive.file(place, (_ROOT / name).read_bytes(), executable=True)
    archive.file("etc/acpi/PWRF/00000080", b"#!/bin/sh\nexec /sbin/shutdown -P\n", executable=True)
    archive.file("etc/os-release", _OS_RELEASE.encode())
    archive.file("etc/passwd", b"root::0:0:root:/:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    archive.link("var/run", "../run")
    archive.link("bin/kvp", "kvp-agent")
    archive.link("sbin/hwclock", "../bin/hwclock")
    archive.file("bin/random-read", _assembled(folder, _RANDOM_READ), executable=True)
    archive.file("bin/qemu-ga", agent.read_bytes(), executable=True)
    for library in _libraries(agent):
        archive.file(str(library), library.read_bytes(), executable=True)
    files = {_module_name(path.name): path for path in (kernel / "modules").rglob("*.ko*")}
    started = _in_order(_MODULES, files)
    for name in (*started, *(name for name in _in_order(_MORE_MODULES, files) if name not in started)):
        archive.file(f"lib/modules/{name}.ko", files[name].read_bytes())
    archive.file("lib/modules/order", "".join(f"{name}.ko\n" for name in started).encode())
    (folder / "initrd").write_bytes(archive.finished())


def _assembled(folder: Path, source: Path) -> bytes:
    """A program made from one assembler file."""
    built, program = folder / "program.o", folder / "program"
    run([tool("as", "binutils"), "--64", "-o", built, source])
    run([tool("ld", "binutils"), "-o", program, built])
    content = program.read_bytes()
    built.unlink()
    program.unlink()
    return content


def _libraries(program: Path) -> Iterator[Path]:
    """The shared libraries of a program, including its loader, at the paths where it looks for them."""
    for line in run([tool("ldd", "libc-bin"), program]).splitlines():
        if found := re.search(r"(?:=> )?(/\S+) \(0x", line):
            yield Path(found[1])


def _module_name(file_name: str) -> str:
    return file_name.partition(".ko")[0].replace("-", "_")


def _in_order(names: tuple[str, ...], files: dict[str, Path]) -> list[str]:
    """These modules and their dependencies, each after those it needs, without those that the kernel does not have."""
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name not in files:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for needed in found[1].decode().split(",") if found else []:
            if needed:
                add(_module_name(needed))
        order.append(name)

    for name in names:
        add(_module_name(name))
    return order


if __name__ == "__main__":
    try:
        print(linux_guest())
    except (GuestUnavailable, subprocess.SubprocessError) as error:
        sys.exit(str(error))
