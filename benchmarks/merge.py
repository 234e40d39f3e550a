# SPDX-License-Identifier: Apache-2.0
"""Merging a chain of 8 layers, 2 GiB of changed data, half of the blocks partly owned.

Contestants, round after round on fresh copies: ours in one pass, ours as 7 single merges, ours into a new file, `cp`
of as many bytes (and a flush, as a merge is durable when it returns), the vhd-lib package from npm doing the same.
Each contestant's result is compared with the chain first. On a reflink file system (XFS on a loop device, for root)
the merge of whole, aligned blocks is compared with copying them. Memory is the peak of a process that merges a disk of
2 TiB. Removing the merged files is part of a merge and can take longer than its data where the device discards slowly,
so it is timed apart too.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import vhdkit
from benchmarks.common import Row, arguments, has, interleaved, report, timed, workplace

GIB, MIB = 1 << 30, 1 << 20
BLOCK = 2 * MIB
LAYERS = 8
# The newest vhd-lib, and the newest whose dependencies a plain registry mirror has (when this was written). The newest
# gets empty stand-ins for the packages that are missing there, none of which a merge of files uses.
NPM_PACKAGES = {
    "vhd-lib@4.15.0": ("@vates/diff", "@vates/stream-reader", "@xen-orchestra/fs"),
    "vhd-lib@0.7.2": (),
}
_STAND_IN = """
const path = require('path')
module.exports = class {}
module.exports.relativeFromFile = (file, target) => path.relative(path.dirname(file), target)
"""
_PROGRAM = """
const fs = require('fs').promises
const handler = {
  openFile: (path, flags) => fs.open(path, flags),
  closeFile: file => file.close(),
  getSize: async file => (typeof file === 'string' ? await fs.stat(file) : await file.stat()).size,
  read: async (file, buffer, position = 0) => file.read(buffer, 0, buffer.length, position),
  write: async (file, buffer, position = 0) => file.write(buffer, 0, buffer.length, position),
  readFile: path => fs.readFile(path),
  writeFile: (path, data, options) => fs.writeFile(path, data, options),
  rename: (from, to) => fs.rename(from, to),
  unlink: path => fs.unlink(path),
}
;(async () => {
  const [base, ...children] = process.argv.slice(2)
  const vhd = require('vhd-lib')
  const mergeVhd = vhd.mergeVhd || vhd.vhdMerge
  if (mergeVhd !== undefined) {
    for (const child of children) await mergeVhd(handler, base, handler, child)
  } else {
    const { mergeVhdChain } = require('vhd-lib/merge')
    await mergeVhdChain(handler, [base, ...children], { removeUnused: true })
    await fs.rename(children[children.length - 1], base) // it gives the result the newest child's name
  }
})().catch(error => { console.error(error); process.exit(1) })
"""


def build(
    folder: Path, total_bytes: int, *, whole_blocks_only: bool = False, suffix: str = "vhd", disk_bytes: int = 8 * GIB
) -> list[Path]:
    """The chain, leaf first. Every block is changed by one layer; half of those in part, in runs of 4 to 128 KiB.

    The base has a page in each block: vhd-lib stops at a partly owned block that its parent lacks. With
    `whole_blocks_only` the base is empty, and every block of the others is owned as a whole.
    """
    rng = random.Random(8)
    paths = [folder / f"{LAYERS - 1 - number}.{suffix}" for number in range(LAYERS)]
    vhdkit.create_image(paths[-1], disk_bytes, disk_format="vhdx" if suffix == "vhdx" else "dynamic")
    blocks = list(range(disk_bytes // BLOCK))
    rng.shuffle(blocks)
    piece = memoryview(rng.randbytes(BLOCK))
    with vhdkit.open_disk(paths[-1], writable=True) as disk:
        for block in () if whole_blocks_only else range(disk_bytes // BLOCK):
            disk.write(block * BLOCK, piece[:4096])
    for number in reversed(range(LAYERS - 1)):
        vhdkit.create_child(paths[number], paths[number + 1])
        written = 0
        with vhdkit.open_disk(paths[number], writable=True) as disk:
            while written < total_bytes // (LAYERS - 1):
                written += _write_block(disk, blocks.pop() * BLOCK, piece, rng)
                if not whole_blocks_only:
                    written += _write_runs(disk, blocks.pop() * BLOCK, piece, rng)
    return paths


def _write_block(disk: vhdkit.Disk, offset: int, piece: memoryview, rng: random.Random) -> int:
    disk.write(offset, rng.randbytes(64) + bytes(piece[64:]))
    return BLOCK


def _write_runs(disk: vhdkit.Disk, offset: int, piece: memoryview, rng: random.Random) -> int:
    written = 0
    for _ in range(12):
        size = rng.choice((4, 16, 64, 128)) << 10
        disk.write(offset + rng.randrange((BLOCK - size) >> 12 << 12), piece[:size])
        written += size
    return written


class Ground:
    """Fresh copies of the chain to work on, in the page cache and on the device."""

    def __init__(self, folder: Path, chain: list[Path]) -> None:
        self.folder, self._chain = folder, chain

    def fresh(self) -> list[Path]:
        """The chain, leaf first, in an unused folder."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for path in self._chain:
            subprocess.run(["cp", "--sparse=always", path, work / path.name], check=True)
        subprocess.run(["sync"], check=True)
        return [work / path.name for path in self._chain]


def one_pass(paths: list[Path]) -> None:
    """All layers into the base at once."""
    vhdkit.merge(paths[0], into=paths[-1])


def single_merges(paths: list[Path]) -> None:
    """Each layer into its parent, from the leaf down: the newest data moves seven times."""
    for path in paths[:-1]:
        vhdkit.merge(path)


def to_new_file(paths: list[Path]) -> None:
    """Into a file beside the chain."""
    vhdkit.merge(paths[0], into=paths[-1], to=paths[0].parent / "new.vhd")


def vhd_lib(folder: Path, package: str) -> Callable[[list[Path]], None] | None:
    """The package from npm, installed for this run only; None if that is impossible."""
    if not has("npm") or not has("node"):
        return None
    home = folder / package
    home.mkdir()
    name, version = package.split("@")
    overrides = {}
    for missing in NPM_PACKAGES[package]:
        stand_in = home / "stand-ins" / missing
        stand_in.mkdir(parents=True)
        (stand_in / "package.json").write_text(json.dumps({"name": missing, "version": "99.0.0"}))
        for file in ("index.js", "path.js"):
            (stand_in / file).write_text(_STAND_IN)
        overrides[missing] = f"file:./stand-ins/{missing}"
    wanted = {"private": True, "dependencies": {name: version}, "overrides": overrides}
    (home / "package.json").write_text(json.dumps(wanted))
    (home / "merge.js").write_text(_PROGRAM)
    command = ["npm", "install", "--no-audit", "--no-fund", "--omit=dev"]
    if subprocess.run(command, cwd=home, capture_output=True, timeout=300, check=False).returncode != 0:
        return None

    def work(paths: list[Path]) -> None:
        subprocess.run(["node", home / "merge.js", *reversed(paths)], check=True, capture_output=True)
        subprocess.run(["sync", paths[-1]], check=True)

    return work


def contestant(ground: Ground, work: Callable[[list[Path]], None]) -> Callable[[], float]:
    """A merge of fresh files."""

    def run() -> float:
        paths = ground.fresh()
        return timed(lambda: work(paths))

    return run


def copying(folder: Path, size_bytes: int) -> Callable[[], float]:
    """`cp` of a file of that many bytes, and a flush."""
    source, copy = folder / "bytes", folder / "copy"
    with source.open("wb") as file:
        for _ in range(0, size_bytes, MIB):
            file.write(os.urandom(MIB))

    def run() -> float:
        copy.unlink(missing_ok=True)
        subprocess.run(["sync"], check=True)
        with source.open("rb", buffering=0) as file:
            while file.read(8 * MIB):
                pass

        def work() -> None:
            subprocess.run(["cp", "--sparse=never", "--reflink=never", source, copy], check=True)
            subprocess.run(["sync", copy], check=True)

        return timed(work)

    return run


def removing(ground: Ground) -> Callable[[], float]:
    """Removing what a merge removes."""

    def run() -> float:
        paths = ground.fresh()
        return timed(lambda: subprocess.run(["rm", *paths[:-1]], check=True))

    return run


def prove(ground: Ground, reference: Path, work: Callable[[list[Path]], None]) -> str:
    """The result of one contestant, compared with the chain."""
    paths = ground.fresh()
    work(paths)
    result = paths[0].parent / "new.vhd" if (paths[0].parent / "new.vhd").exists() else paths[-1]
    try:
        same = vhdkit.compare(result, reference)
    except vhdkit.VhdkitError as error:
        return f"cannot be read: {error}"
    return "the same" if same.same_content else f"differs, first at byte {same.first_difference_bytes}"


def reflink_share(megabytes: int = 1024, rounds: int = 3) -> tuple[float, float] | None:
    """(seconds to merge whole aligned blocks on XFS, seconds to copy them there), or None without root or mkfs.xfs."""
    if os.geteuid() != 0 or not has("mkfs.xfs"):
        return None
    with workplace(None) as folder:
        image, mounted = folder / "xfs", folder / "mounted"
        mounted.mkdir()
        with image.open("wb") as file:
            file.truncate(4 * GIB)
        subprocess.run(["mkfs.xfs", "-q", image], check=True)
        if subprocess.run(["mount", "-o", "loop", image, mounted], check=False, capture_output=True).returncode:
            return None
        try:
            chain = build(mounted, megabytes * MIB, whole_blocks_only=True)
            copy = copying(mounted, megabytes * MIB)
            shared, copied = [], []
            for _ in range(rounds):
                (chain[0].parent / "new.vhd").unlink(missing_ok=True)
                subprocess.run(["sync"], check=True)
                shared.append(timed(lambda: to_new_file(chain)))
                copied.append(copy())
        finally:
            subprocess.run(["umount", mounted], check=True)
    return statistics.median(shared), statistics.median(copied)


def peak_of_a_large_merge(folder: Path) -> float:
    """MiB at the peak of a process that merges two layers of 2040 GiB, each with every 50th block allocated."""
    program = (
        "import resource, sys, vhdkit\n"
        "vhdkit.merge(sys.argv[1], into=sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    paths = [folder / f"large{number}.vhd" for number in range(3)]
    vhdkit.create_image(paths[2], 2040 * GIB)
    for number in (1, 0):
        vhdkit.create_child(paths[number], paths[number + 1])
        with vhdkit.open_disk(paths[number], writable=True) as disk:
            for block in range(number, 2040 * GIB // BLOCK, 50):
                disk.write(block * BLOCK, b"x" * 512)
    done = subprocess.run(
        [sys.executable, "-c", program, paths[0], paths[2]], check=True, capture_output=True, text=True
    )
    for path in paths:
        path.unlink(missing_ok=True)
    return float(done.stdout)


def main() -> None:
    """Build, prove, measure, print."""
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument("--megabytes", type=int, default=2048, help="of changed data")
    options = parser.parse_args()
    with workplace(options.dir) as folder:
        (folder / "chain").mkdir()
        chain = build(folder / "chain", options.megabytes * MIB)
        ground = Ground(folder, chain)
        planned = vhdkit.merge(chain[0], into=chain[-1], dry_run=True)
        contenders: dict[str, Callable[[list[Path]], None]] = {
            "vhdkit, one pass": one_pass,
            "vhdkit, to a new file": to_new_file,
            "vhdkit, 7 merges": single_merges,
        }
        for package in NPM_PACKAGES:
            if (npm := vhd_lib(folder, package)) is not None:
                contenders[package] = npm
        proofs = {name: prove(ground, chain[0], work) for name, work in contenders.items()}
        runs = {name: contestant(ground, work) for name, work in contenders.items()}
        runs["cp and flush"] = copying(folder, planned.data_bytes)
        runs["removing the 7 files"] = removing(ground)
        rows = interleaved(runs, options.rounds)
        shutil.rmtree(folder / "work")
        memory = peak_of_a_large_merge(folder)
    _tell(rows, proofs, planned.data_bytes, memory, options.json)


def _tell(rows: dict[str, Row], proofs: dict[str, str], size: int, memory: float, out: Path | None) -> None:
    ours = rows["vhdkit, one pass"].median
    table = []
    for name, row in rows.items():
        against = "" if name.startswith("removing") else f"{row.median / ours:.2f}"
        table.append([name, f"{row.median:.2f}", f"{size / row.median / MIB:,.0f}", against, proofs.get(name, "")])
    shared = reflink_share()
    if shared is not None:
        table.append(["whole blocks on XFS, shared", f"{shared[0]:.3f}", "", "", ""])
        table.append(["cp of as much there", f"{shared[1]:.3f}", "", f"{shared[0] / shared[1]:.1%} of it", ""])
    table.append(["peak of a merge at 2040 GiB", "", f"{memory:.0f} MiB", "", ""])
    data = {
        "data_bytes": size,
        "seconds": {name: row.median for name, row in rows.items()},
        "content": proofs,
        "reflink_seconds": shared,
        "peak_mib": memory,
        "own_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    columns = [f"merge of {size / GIB:.1f} GiB", "seconds", "MiB/s", "one pass is so much faster", "content"]
    report("merge", columns, table, {"results": data}, out)


if __name__ == "__main__":
    main()
