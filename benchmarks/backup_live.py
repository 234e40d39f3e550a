# SPDX-License-Identifier: Apache-2.0
"""A disk that is served and written to while it is backed up: for `benchmarks/backup.py`.

Decides what the guest does: one connection writes a page of 4 KiB, waits for the answer, rests for a millisecond, and
writes the next page, from before the backup freezes the disk until its merge has ended. The server, the backup and the
writer are processes of their own. The slowest of these writes is what a guest notices.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import vhdkit
from benchmarks.common import Row, start_beside
from tests.nbd_client import WRITE, Client
from tests.servers import read_ready
from vhdkit.units import KIB, MIB

PAGE = 4 * KIB
_ALONE_SECONDS = 1.0
_BETWEEN_SECONDS = 0.001


@dataclass
class Served:
    """A served disk, the guest's connection to it, and the repository that it is saved in."""

    folder: Path
    size_bytes: int
    guest: Client

    def change(self, pages: Sequence[int], seed: int) -> None:
        """Write these pages."""
        rng = random.Random(seed)
        for page in pages:
            self.write(page * PAGE, rng.randbytes(PAGE))

    def write(self, offset: int, data: bytes) -> None:
        """Write as the guest."""
        assert self.guest.call(WRITE, offset, len(data), payload=data).error == 0

    def slowest_write(self, is_over: Callable[[], bool], seed: int) -> float:
        """Seconds of the slowest write to a page anywhere, one after the other until it is over."""
        rng, slowest, pages = random.Random(seed), 0.0, self.size_bytes // PAGE
        while not is_over():
            data, page = rng.randbytes(PAGE), rng.randrange(pages)
            begin = time.perf_counter()
            self.write(page * PAGE, data)
            slowest = max(slowest, time.perf_counter() - begin)
            time.sleep(_BETWEEN_SECONDS)  # a guest that never rests makes the merge several times as long
        return slowest

    def backup(self) -> tuple[float, float]:
        """Save it, keeping a reference; seconds of the slowest write meanwhile, and the program's peak memory."""
        words = [sys.executable, "-m", "vhdkit", "backup", "--control", "disk.ctl", "repository"]
        process = start_beside([*words, "--as", "disk", "--keep-reference", "--quiet"], cwd=self.folder)
        ended: list[tuple[int, float]] = []

        def is_over() -> bool:
            found, status, usage = os.wait4(process.pid, os.WNOHANG)
            if found:
                process.returncode = os.waitstatus_to_exitcode(status)
                ended.append((process.returncode, usage.ru_maxrss * KIB))
            return bool(found)

        slowest = self.slowest_write(is_over, 7)
        assert ended[0][0] == 0, "the backup failed"
        return slowest, ended[0][1]


@contextmanager
def served(folder: Path, size_bytes: int) -> Iterator[Served]:
    """A disk with a sixteenth of it used, served, with a first night."""
    folder.mkdir()
    used = min(size_bytes // 16, 256 * MIB)
    vhdkit.create_image(folder / "disk.vhd", size_bytes)
    with vhdkit.open_disk(folder / "disk.vhd", writable=True) as image:
        for offset in range(0, used, MIB):
            image.write(offset, random.Random(offset).randbytes(MIB))
    words = [sys.executable, "-m", "vhdkit", "serve", "disk.vhd", "--control", "disk.ctl", "--socket", "disk.sock"]
    server = start_beside([*words, "--json"], cwd=folder, stdout=-1, text=True)
    try:
        read_ready(server)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(folder / "disk.sock"))
        with Client(sock) as guest:
            guest.greet()
            guest.go()
            made = Served(folder, size_bytes, guest)
            made.backup()
            yield made
    finally:
        server.terminate()
        server.wait(60)
        if server.stdout is not None:
            server.stdout.close()


def pauses(made: Served, places: Callable[[int], Sequence[int]], rounds: int) -> tuple[Row, Row, Row]:
    """Rows of a night a round: milliseconds of the slowest write beside it, and without it; MiB of the backup."""
    beside, alone, memory = Row("beside a backup"), Row("alone"), Row("memory")
    for number in range(rounds):
        made.change(places(200 + number), number)
        end = time.monotonic() + _ALONE_SECONDS
        alone.values.append(made.slowest_write(lambda end=end: time.monotonic() > end, number) * 1000)  # type: ignore[misc]
        slowest, peak = made.backup()
        beside.values.append(slowest * 1000)
        memory.values.append(peak / MIB)
    return beside, alone, memory
