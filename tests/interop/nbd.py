# SPDX-License-Identifier: Apache-2.0
"""Stock NBD clients on `vhdkit serve`: the three kinds of disk that they get, and how they are run.

The system's own programs are used, whatever environment the tests run in: nbdsh needs the interpreter that has libnbd.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import vhdkit
from tests.interop.disks import MIB, SECTOR, Shape, create_with_content, grow_chain
from tests.servers import Server, serving
from tests.support import require_tool

SIZE = 9 * MIB + 5 * SECTOR
KINDS = ("fixed", "dynamic", "chain")
DEPTH = 4
_SECONDS = 60


@dataclass(frozen=True)
class Image:
    """An image on disk and its expected content."""

    path: Path
    content: bytes


def make_image(folder: Path, kind: str) -> Image:
    """Make a disk of one kind; the chain has four layers with partial bitmaps over a dynamic base."""
    if kind == "chain":
        contents = grow_chain(folder, Shape(vhdkit.DiskFormat.DYNAMIC, SIZE), DEPTH)
        return Image(folder / f"{DEPTH}.vhd", contents[-1])
    path = folder / f"{kind}.vhd"
    return Image(path, create_with_content(path, Shape(vhdkit.DiskFormat(kind), SIZE)))


@contextlib.contextmanager
def served(folder: Path, kind: str, *words: str) -> Iterator[tuple[Server, Image]]:
    """A server of a new disk of that kind, on a socket in `folder`."""
    image = make_image(folder, kind)
    with serving(image.path, "--socket", folder / "sock", *words) as server:
        yield server, image


def client(*command: str | Path) -> str:
    """Run a stock client that must succeed; return its output."""
    words = [require_tool(str(command[0])), *map(str, command[1:])]
    environment = {**os.environ, "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment)
    if done.returncode != 0:
        pytest.fail(f"exit code {done.returncode} from {words}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def qemu_opts(folder: Path, **more: str) -> str:
    """The options by which qemu's programs reach the default export of the socket in `folder`."""
    words = {"driver": "nbd", "server.type": "unix", "server.path": str(folder / "sock"), **more}
    return ",".join(f"{name}={value}" for name, value in words.items())


def states_of_sectors(runs: Sequence[tuple[int, int, int]]) -> list[int]:
    """(offset, length, state) runs as the state of each sector; the runs cover all sectors, in order."""
    states: list[int] = []
    for offset, length, state in runs:
        assert offset == len(states) * SECTOR
        states += [state] * (length // SECTOR)
    return states


def owners_of_sectors(path: Path) -> list[int]:
    """For each sector, the layer that owns it, 0 for the leaf; -1 for none. From the library's own walk."""
    with vhdkit.open_disk(path) as disk:
        return [extent.layer_index for extent in disk.extents() for _ in range(extent.sector_count)]
