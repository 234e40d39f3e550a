# SPDX-License-Identifier: Apache-2.0
"""Flatten a chain into a raw file with nbdcopy, and prove that it is the same disk.

    python examples/copy_with_nbdcopy.py LEAF COPY

nbdcopy (libnbd-bin in Debian, libnbd in Fedora) starts the server itself and hands it the socket, so you need not
choose an address or stop anything afterwards. The same on a command line:

    nbdcopy -- [ vhdkit serve --read-only leaf.avhd ] copy.raw

nbdcopy asks for holes and skips them, and uses several connections. Instead of a file, COPY may be the URI of another
server, `null:`, or a device.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import vhdkit

PIECE_BYTES = 1 << 20


def copy(leaf: str, target: str) -> None:
    """Have nbdcopy read the chain from a server that it starts."""
    server = [sys.executable, "-m", "vhdkit", "serve", "--read-only", leaf]
    subprocess.run(["nbdcopy", "--", "[", *server, "]", target], check=True)


def digest(leaf: str) -> str:
    """The SHA-256 of the whole disk, read without a server."""
    total = hashlib.sha256()
    with vhdkit.open_disk(leaf) as disk:
        for offset in range(0, disk.size_bytes, PIECE_BYTES):
            total.update(disk.read(offset, min(PIECE_BYTES, disk.size_bytes - offset)))
    return total.hexdigest()


def main(leaf: str, target: str) -> int:
    """Copy the disk that `leaf` shows to `target`, which must not exist yet."""
    if Path(target).exists():
        print(f"{target} already exists", file=sys.stderr)
        return 1
    try:
        expected = digest(leaf)
        copy(leaf, target)
    except vhdkit.VhdkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except FileNotFoundError:
        print("nbdcopy is not installed: it comes with libnbd (Debian: libnbd-bin)", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # nbdcopy has printed the reason
    with Path(target).open("rb") as output:
        found = hashlib.file_digest(output, "sha256").hexdigest()
    print(f"{target}: {Path(target).stat().st_size} bytes, SHA-256 {found}")
    if found != expected:
        print("that is not what the chain holds", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} LEAF COPY")
    sys.exit(main(sys.argv[1], sys.argv[2]))
