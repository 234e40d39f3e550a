# SPDX-License-Identifier: Apache-2.0
"""Back up what changed: copy only the sectors that the leaf of a chain owns.

    python examples/back_up_leaf.py LEAF BACKUP

BACKUP is one file: a text line per run (offset, size in bytes, data or zero), an empty line,
then the data of all runs one after the other. Together with a backup of the parents it is the whole disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

import vhdkit

PIECE_BYTES = 1 << 20
LEAF = 0  # layers are counted from the leaf


def main(leaf: str, backup: str) -> int:
    """Write the runs that `leaf` owns to `backup`."""
    try:
        with vhdkit.open_disk(leaf) as disk, Path(backup).open("xb") as output:
            # A run that is a hole in the leaf's file is zeros that the leaf owns: it hides the parents' data there.
            runs = [run for run in disk.extents(find_holes=True) if run.layer_index == LEAF]
            for run in runs:
                output.write(f"{run.offset_bytes} {run.size_bytes} {run.kind}\n".encode())
            output.write(b"\n")
            copied = 0
            for run in runs:
                if run.kind is vhdkit.ExtentKind.DATA:
                    end = run.offset_bytes + run.size_bytes
                    for offset in range(run.offset_bytes, end, PIECE_BYTES):
                        output.write(disk.read(offset, min(PIECE_BYTES, end - offset)))
                    copied += run.size_bytes
            print(f"{leaf}: {len(runs)} runs, {copied} of {disk.size_bytes} bytes copied to {backup}")
    except vhdkit.VhdkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{backup}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} LEAF BACKUP")
    sys.exit(main(sys.argv[1], sys.argv[2]))
