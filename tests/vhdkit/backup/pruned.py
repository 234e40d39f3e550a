# SPDX-License-Identifier: Apache-2.0
"""Repositories that are pruned in tests, and what must be true of one afterwards."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from tests.vhdkit.backup.repositories import Nights
from vhdkit.backup.verify import verify
from vhdkit.unfinished import is_part
from vhdkit.units import KIB, MIB


def make(folder: Path, extension: str = "vhd", count: int = 7) -> Nights:
    """Nights of two disks: mostly a line, with a branch and unchanged disks."""
    rng = random.Random(9)
    nights = Nights(folder, extension)
    nights.add({"a": {0: rng.randbytes(200 * KIB), 5 * MIB: b"x"}, "b": {0: b"b1"}}, files={"definition.json": b"{}"})
    for number in range(2, count + 1):
        on = 2 if number == 5 else None
        nights.add(
            {
                "a": {rng.randrange(2000) * 4096: rng.randbytes(rng.choice([3, 4096, 30_000])) for _ in range(4)},
                "b": {rng.randrange(2000) * 4096: rng.randbytes(50)} if number % 3 == 0 else {},
            },
            on=on,
            files={"nvram": rng.randbytes(10)},
        )
    return nights


def copy(nights: Nights, folder: Path) -> Nights:
    """A copy of a repository, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(nights.path, folder)
    return Nights(folder, nights.extension, nights.content)


def left(nights: Nights) -> list[int]:
    """The nights that are there."""
    with nights.machine() as machine:
        return [one.number for one in machine.nights() if one.manifest is not None and not one.manifest.dropped]


def check(nights: Nights, *numbers: int) -> None:
    """These nights are the ones that are left, read as they must, and everything about them is in order; no file is
    left that none of them needs."""
    assert left(nights) == list(numbers)
    nights.check(*numbers)
    with nights.machine() as machine:
        result = verify(machine, again=True)
        assert result.is_good, (result.damaged, [one.problems for one in result.nights])
        manifests = [one.manifest for one in machine.nights() if one.manifest is not None]
        named = {disk.image.text for one in manifests for disk in one.disks}
        files = [one for one in Path(machine.path, "images").rglob("*.*") if not is_part(one.name)]  # we are alive
        found = {os.path.relpath(one, machine.path) for one in files}
        assert found == named | {f"{one}.sums" for one in named}
        assert sorted(os.listdir(Path(machine.path, "meta"))) == [f"{number:05d}" for number in numbers]
        assert not Path(machine.path, "prune.json").exists()
