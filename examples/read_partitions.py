# SPDX-License-Identifier: Apache-2.0
"""Read the boot sector of a disk and list its partitions.

    python examples/read_partitions.py IMAGE

The image may be of any kind, or the leaf of a chain: the program reads the disk as a machine would see it.
"""

from __future__ import annotations

import struct
import sys

import vhdkit

SECTOR_SIZE = 512  # bytes
FIRST_ENTRY, ENTRY_SIZE, ENTRY_COUNT = 446, 16, 4  # bytes, bytes, entries of the partition table
SIGNATURE = b"\x55\xaa"


def main(image: str) -> int:
    """List the partitions of `image`."""
    try:
        with vhdkit.open_disk(image) as disk:
            print(f"{image}: {disk.size_bytes} bytes")
            boot_sector = disk.read(0, SECTOR_SIZE)
    except vhdkit.VhdkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not boot_sector.endswith(SIGNATURE):
        print("no partition table")
        return 0
    for number in range(ENTRY_COUNT):
        entry = boot_sector[FIRST_ENTRY + number * ENTRY_SIZE :][:ENTRY_SIZE]
        status, kind, first_sector, sector_count = struct.unpack("<B3xB3xII", entry)
        if kind:
            active = ", active" if status & 0x80 else ""
            print(
                f"partition {number + 1}: type {kind:#04x}{active},"
                f" starts at byte {first_sector * SECTOR_SIZE}, {sector_count * SECTOR_SIZE} bytes"
            )
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} IMAGE")
    sys.exit(main(sys.argv[1]))
