# SPDX-License-Identifier: Apache-2.0
"""A disk that boots the Linux guest through the BIOS, from any controller, with an ext4 partition.

    sector 0     linux_loader.S, the partition table       LBA 8     kernel, then the initial RAM file system
    sector 1     the kernel's command line                 32 MiB    partition 1: ext4, labelled "guest"

`python -m tests.vmm.guests.linux_disk FILE` makes one. The guest needs `MEMORY` MiB. It sees the disk by its
controller's driver; `findfs LABEL=guest` finds the partition.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

from tests.vmm.guests.linux import APPEND, LinuxGuest, linux_guest
from tests.vmm.guests.tools import GuestUnavailable, kept, run, tool

SECTOR = 512
MEMORY = "256"
KERNEL_LBA = 8
PARTITION_LBA = 65536
_INITRD_ADDRESS = 160 << 20  # above what the kernel needs to unpack itself, below the end of MEMORY
_SOURCE = Path(__file__).with_name("linux_loader.S")
_PARAMETERS_OFFSET = 416
_PARTITION_ENTRY_OFFSET = 446
_TYPE_LINUX = 0x83


def write_raw_disk(path: Path, *, append: str = APPEND, partition_bytes: int = 16 << 20) -> None:
    """A new raw image of such a disk, sparse. Raises GuestUnavailable."""
    guest = linux_guest()
    size_bytes = PARTITION_LBA * SECTOR + partition_bytes
    make_file_system = tool("mke2fs", "e2fsprogs")
    with path.open("xb") as file:
        file.truncate(size_bytes)
        _write_system(file.fileno(), guest, append, partition_bytes)
    offset = f"offset={PARTITION_LBA * SECTOR}"
    run([make_file_system, "-q", "-F", "-t", "ext4", "-L", "guest", "-E", offset, path, f"{partition_bytes >> 10}k"])


def _write_system(descriptor: int, guest: LinuxGuest, append: str, partition_bytes: int) -> None:
    kernel, initrd = guest.kernel.read_bytes(), guest.initrd.read_bytes()
    setup_sectors = 1 + (kernel[0x1F1] or 4)
    kernel_sectors, initrd_sectors = -(-len(kernel) // SECTOR), -(-len(initrd) // SECTOR)
    initrd_lba = KERNEL_LBA + kernel_sectors
    assert initrd_lba + initrd_sectors <= PARTITION_LBA, "kernel and file system reach into the partition"
    parameters = struct.pack("<6IH", KERNEL_LBA, kernel_sectors - setup_sectors, initrd_lba, initrd_sectors,
                             len(initrd), _INITRD_ADDRESS, setup_sectors)  # fmt: skip
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", _TYPE_LINUX, b"\xfe\xff\xff",
                        PARTITION_LBA, partition_bytes // SECTOR)  # fmt: skip
    boot = bytearray(_assembled())
    boot[_PARAMETERS_OFFSET : _PARAMETERS_OFFSET + len(parameters)] = parameters
    boot[_PARTITION_ENTRY_OFFSET : _PARTITION_ENTRY_OFFSET + len(entry)] = entry
    for lba, data in (0, bytes(boot)), (1, append.encode()), (KERNEL_LBA, kernel), (initrd_lba, initrd):
        os.pwrite(descriptor, data, lba * SECTOR)


def _assembled() -> bytes:
    def make(folder: Path) -> None:
        assembler, linker = tool("as", "binutils"), tool("ld", "binutils")
        run([assembler, "--32", "-o", folder / "loader.o", _SOURCE])
        run([linker, "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary",
             "-o", folder / "loader.bin", folder / "loader.o"])  # fmt: skip

    return (kept("linux-loader", [_SOURCE.read_bytes()], make) / "loader.bin").read_bytes()


if __name__ == "__main__":
    try:
        write_raw_disk(Path(sys.argv[1]))
    except (GuestUnavailable, OSError) as error:
        sys.exit(str(error))
