# SPDX-License-Identifier: Apache-2.0
"""Change a disk without touching it: make a child and write into that.

    python examples/write_to_child.py PARENT CHILD OFFSET TEXT

The parent stays as it is, byte for byte; the disk as the child shows it has TEXT at byte OFFSET.
"""

from __future__ import annotations

import sys

import vhdkit


def main(parent: str, child: str, offset_bytes: int, text: str) -> int:
    """Write `text` at `offset_bytes` of the disk, into the new image `child`."""
    data = text.encode()
    try:
        vhdkit.create_child(child, parent)
        with vhdkit.open_disk(child, writable=True) as disk:
            before = disk.read(offset_bytes, len(data))
            disk.write(offset_bytes, data)
            disk.flush()  # from here on it survives a power cut
            print(f"byte {offset_bytes} was {before!r}, is {disk.read(offset_bytes, len(data))!r}")
        with vhdkit.open_disk(parent) as disk:
            print(f"in the parent it still is {disk.read(offset_bytes, len(data))!r}")
    except vhdkit.VhdkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(f"usage: {sys.argv[0]} PARENT CHILD OFFSET TEXT")
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
