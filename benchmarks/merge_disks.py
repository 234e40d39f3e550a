# SPDX-License-Identifier: Apache-2.0
"""Merging and converting where the disk decides: file systems that share space, and a cold page cache; with goals.

Part `shared`: on XFS and Btrfs (loop devices, for root) our images are merged and converted to fixed images, against
`cp` of the chain's files and a flush there. Also counted: the bytes that reach the loop device.

Part `cold`: a chain of 8 layers, none of it in the page cache, is merged in place, against `cp` of as many bytes from
a cold file and a flush. A merge also removes its sources. That is counted in one row, and left out of the other: there
the files are held open, so that their space is freed later.

    script/bench merge_disks -- --only shared --gib 8
    script/bench merge_disks -- --only cold --megabytes 1024
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import vhdkit
from benchmarks.common import Row, arguments, has, report, timed, workplace
from benchmarks.merge import Ground, build, one_pass
from benchmarks.nbd import middle_ratio
from benchmarks.nbd_cold import make_cold

MIB, GIB = 1 << 20, 1 << 30
PARTS = ("shared", "cold")
KINDS = ("xfs", "btrfs")
GOAL_SECONDS, GOAL_WRITTEN, GOAL_COLD, GOAL_VHDX = 0.1, 0.01, 0.7, 0.97
LINE = 512  # bytes of a sector in /sys/block/*/stat

Line = list[str]


# -- file systems that share ------------------------------------------------------------------------------------


@contextmanager
def file_system(folder: Path, kind: str, size_bytes: int) -> Iterator[Path | None]:
    """A new file system of that kind, mounted until the block ends; None where that is impossible."""
    image, mounted = folder / kind, folder / f"{kind}-mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(size_bytes)
    made = has(f"mkfs.{kind}") and os.geteuid() == 0
    if not made or subprocess.run([f"mkfs.{kind}", "-q", image], check=False, stdout=subprocess.DEVNULL).returncode:
        yield None
        return
    if subprocess.run(["mount", "-o", "loop", image, mounted], check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)
        image.unlink()


def written_bytes(folder: Path) -> int:
    """What reached the device of the file system so far, with everything that waits for it."""
    subprocess.run(["sync", "-f", folder], check=True)
    found = subprocess.run(["findmnt", "-no", "SOURCE", folder], check=True, capture_output=True, text=True).stdout
    return int(Path("/sys/block", Path(found.strip()).name, "stat").read_text().split()[6]) * LINE


def measured(folder: Path, work: Callable[[], object]) -> tuple[float, int]:
    """(seconds, bytes written to the device) of some work."""
    before = written_bytes(folder)
    seconds = timed(work)
    return seconds, written_bytes(folder) - before


def copied(sources: list[Path], folder: Path) -> None:
    """`cp` into a folder, and a flush."""
    subprocess.run(["cp", "--sparse=never", "--reflink=never", *sources, folder], check=True)
    subprocess.run(["sync", *folder.iterdir()], check=True)


def shared(place: Path, gib: int, kinds: Sequence[str]) -> Iterator[Line]:
    """Merges and conversions on each file system, of chains of both formats with so much data in whole blocks."""
    for kind in kinds:
        for suffix in ("vhd", "vhdx"):
            with file_system(place, kind, (2 * gib + 2) * GIB) as folder:
                if folder is None:
                    yield [f"shared: {kind}", suffix, "", "", "", "", "not possible here"]
                    break
                yield from on_one(folder, kind, suffix, gib)
            (place / f"{kind}-mounted").rmdir()


def on_one(folder: Path, kind: str, suffix: str, gib: int) -> Iterator[Line]:
    """On one file system, with images of one format."""
    chain = build(folder, gib * GIB, whole_blocks_only=True, suffix=suffix, disk_bytes=(gib + 1) * GIB)
    data = vhdkit.merge(chain[0], into=chain[-1], dry_run=True).data_bytes
    copy = folder / "copy"
    copy.mkdir()
    copying, _ = measured(folder, partial(copied, chain, copy))
    shutil.rmtree(copy)
    works: dict[str, Callable[[], object]] = {
        "convert to fixed": partial(vhdkit.convert, chain[0], folder / "fixed.vhd", "fixed"),
        "merge to a new file": partial(vhdkit.merge, chain[0], into=chain[-1], to=folder / f"new.{suffix}"),
        "merge in place": partial(vhdkit.merge, chain[0], into=chain[-1]),
    }
    for what, work in works.items():
        seconds, written = measured(folder, work)
        part, bytes_part = seconds / copying, written / data
        met = part <= GOAL_SECONDS and bytes_part <= GOAL_WRITTEN
        yield [
            f"shared: {what}, {kind}", suffix, f"{seconds:.2f} s", f"cp {copying:.2f} s", f"{part:.3f} of it",
            f"{bytes_part:.2%} written", "met" if met else "SHORT",
        ]  # fmt: skip


# -- cold -------------------------------------------------------------------------------------------------------


def cold(place: Path, megabytes: int, rounds: int) -> Iterator[Line]:
    """Merges of cold chains, and `cp` of a cold file of as many bytes in the same round."""
    grounds, data = {}, 0
    for suffix in ("vhd", "vhdx"):
        (place / suffix).mkdir()
        chain = build(place / suffix, megabytes * MIB, suffix=suffix)
        grounds[suffix] = Ground(place, chain)
        data = max(data, vhdkit.merge(chain[0], into=chain[-1], dry_run=True).data_bytes)
    source = place / "bytes"
    with source.open("wb") as file:
        for _ in range(0, data, MIB):
            file.write(os.urandom(MIB))
    names = [(suffix, removes) for suffix in grounds for removes in (False, True)]
    rows = {name: Row(f"{name[0]} {name[1]}") for name in names}
    copying = Row("cp and flush")
    for _ in range(max(rounds, 1)):
        for suffix, removes in names:
            rows[suffix, removes].values.append(cold_merge(grounds[suffix], removes=removes))
        (place / "copy").mkdir()
        subprocess.run(["sync"], check=True)
        make_cold(source)
        copying.values.append(timed(partial(copied, [source], place / "copy")))
        shutil.rmtree(place / "copy")
    for (suffix, removes), row in rows.items():
        ratio = middle_ratio(copying, row)
        yield [
            f"cold: merge of {data / GIB:.1f} GiB, removing {'counted' if removes else 'not counted'}", suffix,
            f"{row.median:.2f} s", f"cp {copying.median:.2f} s", f"{ratio:.2f} of its speed", "",
            "met" if ratio >= GOAL_COLD else "SHORT",
        ]  # fmt: skip
    for removes in (False, True):
        ratio = middle_ratio(rows["vhd", removes], rows["vhdx", removes])
        yield ["cold: VHDX against VHD", "", "", "", f"{ratio:.2f}", "", "met" if ratio >= GOAL_VHDX else "SHORT"]


def cold_merge(ground: Ground, *, removes: bool) -> float:
    """Seconds for a merge of fresh files that are not in the page cache."""
    paths = ground.fresh()
    with ExitStack() as held:
        for path in paths if not removes else ():
            held.enter_context(path.open("rb"))
        make_cold(*paths)
        return timed(partial(one_pass, paths))


def main() -> None:
    """Measure, print."""
    options = arguments((__doc__ or "").splitlines()[0], rounds=3)
    options.add_argument("--only", choices=PARTS, help="one part")
    options.add_argument("--kind", choices=KINDS, action="append", help="one file system that shares")
    options.add_argument("--gib", type=int, default=8, help="of data that is shared")
    options.add_argument("--megabytes", type=int, default=2048, help="of data in the cold chain")
    wanted = options.parse_args()
    lines: list[Line] = []
    for part in PARTS if wanted.only is None else (wanted.only,):
        with workplace(wanted.dir or Path("/var/tmp")) as place:
            sharing = shared(place, wanted.gib, wanted.kind or KINDS)
            for line in sharing if part == "shared" else cold(place, wanted.megabytes, wanted.rounds):
                print("  ".join(cell for cell in line if cell), flush=True)
                lines.append(line)
    columns = ["what", "format", "seconds", "against", "ratio", "written", ""]
    results = [dict(zip(columns, line, strict=True)) for line in lines]
    report("merges on disks", columns, lines, {"results": results}, wanted.json)


if __name__ == "__main__":
    main()
