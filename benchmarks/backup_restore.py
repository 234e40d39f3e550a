# SPDX-License-Identifier: Apache-2.0
"""From `vmm restore --now` to a guest that runs: for `benchmarks/backup.py`.

Decides when a guest runs: when its first byte is in the log of its console. The guest is a boot sector under TCG, so
nearly all of the time is vmm's. The machine, its nights and what is restored are in a state home of the benchmark.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import vhdkit
from benchmarks.backup_disk import used_bytes
from benchmarks.common import Row
from tests.vmm.guests import boot_sector
from vhdkit.units import GIB, MIB

_VMM = str(Path(sys.executable).with_name("vmm"))
_START_SECONDS = 60.0
_LOOK_SECONDS = 0.001


class Host:
    """vmm with a state home and a runtime folder of its own."""

    def __init__(self, folder: Path, runtime: str) -> None:
        self.folder = folder
        self._environment = {**os.environ, "VMM_HOME": str(folder / "home"), "VMM_RUNTIME": runtime}

    def run(self, *words: str, may_fail: bool = False) -> None:
        """A command, which must succeed."""
        done = subprocess.run(
            [_VMM, *words], env=self._environment, cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode and not may_fail:
            raise SystemExit(f"vmm {' '.join(words)} failed: {done.stderr.strip()}")

    def end(self, name: str) -> None:
        """Power a machine off and remove it, with its disks."""
        self.run("stop", name, may_fail=True)  # it may be off
        self.run("delete", name, "--with-disks", "--yes")

    def seconds_to_run(self, night: str, name: str) -> float:
        """Restore a night as the machine `name`, at once; seconds to the guest's first byte."""
        log = self.folder / "home" / "machines" / name / "console.log"
        begin = time.perf_counter()
        words = [_VMM, "restore", "repository", night, "--as", name, "--now", "--quiet"]
        with subprocess.Popen(words, env=self._environment, cwd=self.folder) as process:
            while not (log.exists() and b"B" in log.read_bytes()):
                if time.perf_counter() > begin + _START_SECONDS or process.poll() not in (None, 0):
                    raise SystemExit(f"the guest of {night} did not speak")
                time.sleep(_LOOK_SECONDS)  # the time to the first byte is what is measured
            seconds = time.perf_counter() - begin
        if process.returncode:
            raise SystemExit(f"vmm restore of {night} failed")
        return seconds


@contextmanager
def host(folder: Path) -> Iterator[Host]:
    """A host whose machines have ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="vmmb-") as runtime:  # sockets have short names
        made = Host(folder, runtime)
        try:
            yield made
        finally:
            for name in sorted(path.name for path in (folder / "home" / "machines").glob("*")):
                made.end(name)


def instant(folder: Path, sizes_gib: Sequence[int], rounds: int) -> list[Row]:
    """A row for each size of a disk: seconds of each round, after one that does not count."""
    rows = [Row(f"{gib} GiB") for gib in sizes_gib]
    with host(folder) as made:
        for gib in sizes_gib:
            name = f"of-{gib}"
            _make_image(folder / f"{name}.vhd", gib * GIB)
            made.run("create", name, "--memory", "16M", "--accel", "tcg", "--disk", f"{name}.vhd")
            made.run("backup", "run", name, "repository", "--quiet")
        for number in range(max(rounds, 3) + 1):
            for gib, row in zip(sizes_gib, rows, strict=True):
                seconds = made.seconds_to_run(f"of-{gib}", "again")
                made.end("again")
                if number:
                    row.values.append(seconds)
    return rows


def _make_image(path: Path, size_bytes: int) -> None:
    vhdkit.create_image(path, size_bytes)
    rng = random.Random(1)
    with vhdkit.open_disk(path, writable=True) as disk:
        for offset in range(MIB, used_bytes(size_bytes), MIB):
            disk.write(offset, rng.randbytes(MIB))
        boot_sector.install(disk)
