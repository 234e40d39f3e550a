# SPDX-License-Identifier: Apache-2.0
"""Nights of a backup: 1 % of a disk changed since the last one, in pages of 4 KiB, at random or in clusters.

vhdkit saves the layer that was frozen (`--keep-reference`). Beside it runs a plain loop that copies the same ranges
from a raw file with the same content, with `pread` and `pwrite` and one `fdatasync` at the end: nothing can know where
the changes are and do less. The sources are in the page cache for both. With `--peers` borg and restic, where they are
installed, save the same disk as a raw file, as they have to read all of it; choose a small `--gib` then.

Rows: seconds a night, and how much space a night takes, in bytes for each byte that changed. `full` is the first night
against `cp --sparse=always` and a flush; `verify` against reading the same files through SHA-256 on all cores.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import vhdkit
from benchmarks.common import Row, arguments, has, interleaved, report, timed, workplace
from vhdkit.backup.manifest import Consistency, Manifest
from vhdkit.backup.night import Circumstances, FrozenDisk, Wishes, writing
from vhdkit.backup.repository import create_repository, open_repository
from vhdkit.backup.verify import verify
from vhdkit.chain.engine.chain import Chain
from vhdkit.units import GIB, KIB, MIB

PAGE = 4 * KIB
MACHINE = "benchmark"
GOALS = {"time": 1.3, "random space": 1.25, "clustered space": 1.05, "full": 1 / 0.9, "verify": 1 / 0.8}


@dataclass
class Disk:
    """A disk as a chain, and the same content as a raw file."""

    folder: Path
    size_bytes: int
    base_bytes: int
    leaf: Path
    raw: Path

    @classmethod
    def made(cls, folder: Path, size_bytes: int) -> Disk:
        """A disk with a sixteenth of it used, at most 1 GiB."""
        used = min(size_bytes // 16, GIB)
        disk = cls(folder, size_bytes, used, folder / "disk.vhd", folder / "disk.raw")
        vhdkit.create_image(disk.leaf, size_bytes)
        with vhdkit.open_disk(disk.leaf, writable=True) as image, disk.raw.open("wb") as raw:
            raw.truncate(size_bytes)
            rng = random.Random(1)
            for offset in range(0, used, MIB):
                data = rng.randbytes(MIB)
                image.write(offset, data)
                os.pwrite(raw.fileno(), data, offset)
        return disk

    def places(self, kind: str, seed: int) -> list[int]:
        """Where 1 % of the pages lie that change: anywhere, or in runs of 64."""
        rng, count = random.Random(seed), self.size_bytes // PAGE // 100
        if kind == "random":
            return sorted(rng.sample(range(self.size_bytes // PAGE), count))
        runs = rng.sample(range(self.size_bytes // PAGE // 64), count // 64)
        return sorted(run * 64 + page for run in runs for page in range(64))

    def change(self, places: Sequence[int], seed: int) -> None:
        """Write these pages to the chain's leaf and to the raw file."""
        rng = random.Random(seed)
        with vhdkit.open_disk(self.leaf, writable=True) as image, self.raw.open("r+b") as raw:
            for page in places:
                data = rng.randbytes(PAGE)
                image.write(page * PAGE, data)
                os.pwrite(raw.fileno(), data, page * PAGE)

    def freeze(self) -> Path:
        """Go on in a new child; the frozen layer."""
        frozen, self.leaf = self.leaf, Path(vhdkit.snapshot(self.leaf))
        return frozen


def save(disk: Disk, repository: Path) -> Manifest:
    """Freeze the disk and write a night."""
    frozen = disk.freeze()
    facts = Circumstances(datetime.now(UTC), "UTC", timedelta(0), "benchmark", Consistency.CRASH)
    with (
        create_repository(repository) as opened,
        writing(opened, MACHINE, MACHINE, Wishes()) as night,
        Chain.open(frozen) as chain,
    ):
        return night.save([FrozenDisk("disk", chain, keeps_layer=True)], facts)


def plain_loop(disk: Disk, places: Sequence[int], target: Path) -> None:
    """Copy these pages of the raw file, run by run, to a sparse file; one flush."""
    runs: list[list[int]] = []
    for page in places:
        if runs and runs[-1][1] == page:
            runs[-1][1] = page + 1
        else:
            runs.append([page, page + 1])
    with disk.raw.open("rb") as source, target.open("wb") as new:
        for first, stop in runs:
            data = os.pread(source.fileno(), (stop - first) * PAGE, first * PAGE)
            os.pwrite(new.fileno(), data, first * PAGE)
        os.fdatasync(new.fileno())
    target.unlink()


def nights(disk: Disk, repository: Path, kind: str, rounds: int) -> tuple[dict[str, Row], Row]:
    """A night a round, and the loop over the same pages; also the space of each night, for each byte that changed."""
    space = Row("vhdkit, space")
    places: list[int] = []
    number = 0

    def night() -> float:
        nonlocal places, number
        number += 1
        places = disk.places(kind, number)
        disk.change(places, number)
        os.sync()  # what the change wrote is not the night's to wait for
        made: list[Manifest] = []
        seconds = timed(lambda: made.append(save(disk, repository)))
        space.values.append(made[0].disks[0].data_bytes / (len(places) * PAGE))
        assert made[0].disks[0].how == "layers"
        return seconds

    loop = disk.folder / "loop.raw"
    rows = interleaved({"vhdkit": night, "loop": lambda: timed(lambda: plain_loop(disk, places, loop))}, rounds)
    return rows, space


def full(disk: Disk, rounds: int) -> dict[str, Row]:
    """The first night, and `cp` of the raw file with a flush."""
    copy, repository = disk.folder / "copy.raw", disk.folder / "first"

    def night() -> float:
        seconds = timed(lambda: save(disk, repository))
        shutil.rmtree(repository)
        return seconds

    def copied() -> float:
        def run() -> None:
            subprocess.run(["cp", "--sparse=always", disk.raw, copy], check=True)
            with copy.open("rb") as file:
                os.fdatasync(file.fileno())

        seconds = timed(run)
        copy.unlink()
        return seconds

    return interleaved({"vhdkit": night, "cp": copied}, rounds)


def verified(repository: Path, rounds: int) -> dict[str, Row]:
    """`verify`, and reading the data of the same images through SHA-256 on all cores."""
    images = [one for one in repository.rglob("images/*/*") if one.suffix != ".sums"]

    def whole() -> float:
        with open_repository(repository) as opened, opened.machine(MACHINE) as machine:
            seconds = timed(lambda: verify(machine, again=True))
        return seconds

    def hashed() -> float:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pieces = [piece for image in images for piece in data_of(image)]
            return timed(lambda: list(pool.map(hash_of, pieces)))

    return interleaved({"vhdkit": whole, "hash": hashed}, rounds)


def data_of(path: Path) -> list[tuple[Path, int, int]]:
    """(file, offset, size) of the parts of a file that are not holes, at most 4 MiB each."""
    found = []
    with path.open("rb") as file:
        end, position = os.fstat(file.fileno()).st_size, 0
        while position < end:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found += [(path, at, min(4 * MIB, position - at)) for at in range(start, position, 4 * MIB)]
    return found


def hash_of(piece: tuple[Path, int, int]) -> bytes:
    """The SHA-256 of a part of a file."""
    path, offset, size = piece
    with path.open("rb") as file:
        return hashlib.sha256(os.pread(file.fileno(), size, offset)).digest()


def peers(disk: Disk, kind: str, rounds: int) -> dict[str, tuple[Row, Row]]:
    """Seconds and space of a night of each peer that is installed, on the raw file: seven nights, as a rule."""
    environment = {**os.environ, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes", "RESTIC_PASSWORD": "benchmark"}

    def run(*words: str | Path) -> None:
        subprocess.run([*map(str, words)], check=True, env=environment, capture_output=True, cwd=disk.folder)

    commands: dict[str, Callable[[Path, int], None]] = {}
    for name, begin, night in (
        ("borg", ("borg", "init", "-e", "none"), lambda place, number: run(
            "borg", "create", f"{place}::{number}", disk.raw.name)),
        ("restic", ("restic", "init", "-r"), lambda place, number: run(
            "restic", "backup", "-q", "-r", place, disk.raw.name)),
    ):  # fmt: skip
        if has(name):
            run(*begin, disk.folder / name)
            commands[name] = night
    rows = {name: (Row(name), Row(name)) for name in commands}
    for number in range(rounds + 1):
        places = disk.places(kind, 100 + number)
        disk.change(places, 100 + number)
        for name, night in commands.items():
            before = used(disk.folder / name)
            seconds = timed(lambda night=night, name=name, number=number: night(disk.folder / name, number))  # type: ignore[misc]
            if number:
                rows[name][0].values.append(seconds)
                rows[name][1].values.append((used(disk.folder / name) - before) / (len(places) * PAGE))
    return rows


def used(folder: Path) -> int:
    """How much space the files of a folder take."""
    return sum(one.stat().st_blocks * 512 for one in folder.rglob("*") if one.is_file())


def main() -> None:
    """Run it."""
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument("--gib", type=int, default=16, help="size of the disk")
    parser.add_argument("--kind", choices=("random", "clustered", "both"), default="both", help="where changes lie")
    parser.add_argument("--only", choices=("nights", "full", "verify"), help="only this part")
    parser.add_argument("--peers", action="store_true", help="also borg and restic")
    options = parser.parse_args()
    kinds = ("random", "clustered") if options.kind == "both" else (options.kind,)
    table, data = [], {}

    def add(name: str, ours: Row, other: str, theirs: Row | None, goal: float | None) -> None:
        ratio = ours.median if theirs is None else ours.median / theirs.median
        wanted = "" if goal is None else f"<= {goal:.2f}"
        beside = "" if theirs is None else f"{theirs.median:.3f} ({other})"
        table.append([name, f"{ours.median:.3f}", beside, f"{ratio:.2f}", wanted])
        data[name] = {"value": ours.median, "beside": None if theirs is None else theirs.median, "ratio": ratio}

    with workplace(options.dir) as folder:
        disk = Disk.made(folder, options.gib * GIB)
        if options.only in (None, "full"):
            rows = full(disk, options.rounds)
            add("full night, s", rows["vhdkit"], "cp", rows["cp"], GOALS["full"])
        repository = folder / "repository"
        save(disk, repository)
        for kind in kinds if options.only in (None, "nights") else ():
            rows, space = nights(disk, repository, kind, options.rounds)
            add(f"{kind} night, s", rows["vhdkit"], "loop", rows["loop"], GOALS["time"])
            add(f"{kind} night, bytes per changed byte", space, "", None, GOALS[f"{kind} space"])
        if options.only in (None, "verify"):
            rows = verified(repository, options.rounds)
            add("verify, s", rows["vhdkit"], "hash", rows["hash"], GOALS["verify"])
        for kind in kinds if options.peers else ():
            for name, (seconds, space) in peers(disk, kind, options.rounds).items():
                add(f"{name}, {kind} night, s", seconds, "", None, None)
                add(f"{name}, {kind} night, bytes per changed byte", space, "", None, None)
                shutil.rmtree(folder / name)
    columns = ["", "vhdkit or peer", "beside", "ratio", "goal"]
    report(f"backup: 1 % of {options.gib} GiB changed", columns, table, {"rows": data}, options.json)


if __name__ == "__main__":
    main()
