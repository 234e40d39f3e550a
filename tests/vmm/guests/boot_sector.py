# SPDX-License-Identifier: Apache-2.0
"""The boot-sector guest: assembles boot_sector.S and fills in what the guest should do.

What it says on the first serial port, a line each (CR LF):

    BOOT-OK                the boot sector and the four after it were read; on the screen, too
    <text>                 the text of sector READ_LBA
    WRITE-OK               "written by the guest" stands in sector WRITE_LBA
    READY                  it counts from here on (18.2 times a second), unless it powers off at once
    tick N                 each `print_every`; each `write_every` N goes to COUNT_LBA, 32 bits little endian
    power button           it was asked to power off by ACPI (when `power_button`), and does

Keys on the serial port: c → "count N"; w → writes N, "written N"; d → the text of READ_LBA again; r resets; h →
"halted" for ever; p → "power off"; any other → "key X". A failed read or write → "DISK-ERROR". Powering off tries the
port of QEMU's isa-debug-exit first, so QEMU may end with exit code 33 instead of 0 where that device is present.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.vmm.guests.tools import kept, run, tool

SECTOR = 512
READ_LBA, WRITE_LBA, COUNT_LBA = 16, 17, 18
READ_TEXT = b"LBA16-DATA"
WRITTEN_TEXT = b"written by the guest"
MIN_DISK_BYTES = 1 << 20  # SeaBIOS wants a disk, not a floppy
_REST_SECTORS = 4
_OPTIONS_OFFSET = 512
_SOURCE = Path(__file__).with_name("boot_sector.S")


class _Disk(Protocol):
    def write(self, offset_bytes: int, data: bytes, /) -> object: ...


@dataclass(frozen=True)
class BootOptions:
    """What the guest should do."""

    power_off_at_once: bool = False
    print_every: int = 0  # ticks; 0: never
    write_every: int = 0  # ticks; 0: never
    power_button: bool = True


def boot_code(options: BootOptions | None = None) -> bytes:
    """The first five sectors of the guest's disk."""
    options = options or BootOptions()
    code = (_assembled() / "boot.bin").read_bytes()
    settings = bytes(
        (options.power_off_at_once, options.print_every, options.write_every, options.power_button)
    ) + b"".join(lba.to_bytes(8, "little") for lba in (READ_LBA, WRITE_LBA, COUNT_LBA))
    return code[:_OPTIONS_OFFSET] + settings + code[_OPTIONS_OFFSET + len(settings) :]


def install(disk: _Disk, options: BootOptions | None = None, *, text: bytes = READ_TEXT) -> None:
    """Write the guest and the text that it reads to a disk (a `vhdkit.Disk`, or any object with its `write`)."""
    disk.write(0, boot_code(options))
    disk.write(READ_LBA * SECTOR, text.ljust(SECTOR, b"\0"))


def write_raw_disk(
    path: Path, options: BootOptions | None = None, *, text: bytes = READ_TEXT, size_bytes: int = MIN_DISK_BYTES
) -> None:
    """A raw image of the guest's disk."""
    with path.open("xb") as file:
        file.truncate(size_bytes)
        file.write(boot_code(options))
        file.seek(READ_LBA * SECTOR)
        file.write(text)


def _assembled() -> Path:
    def make(folder: Path) -> None:
        assembler, linker = tool("as", "binutils"), tool("ld", "binutils")
        run([assembler, "--32", "--defsym", f"REST_SECTORS={_REST_SECTORS}", "-o", folder / "boot.o", _SOURCE])
        run([linker, "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary",
             "-o", folder / "boot.bin", folder / "boot.o"])  # fmt: skip
        size = (folder / "boot.bin").stat().st_size
        assert size == SECTOR * (1 + _REST_SECTORS), size

    return kept("boot-sector", [_SOURCE.read_bytes(), str(_REST_SECTORS)], make)
