# SPDX-License-Identifier: Apache-2.0
"""Every sequence of up to three verbs on a tiny chain, with a power cut at every point of the last, then every verb.

    a chain --verb--> a folder --verb--> a folder --verb, cut at each boundary--> a folder --any verb--> judged

A disk is identified by its expected content (`World.disks`), not by its number of layers. After a cut each disk reads
as before the verb or as after it. The next verb either succeeds, or refuses and changes nothing; if it refused because
of the cut, it succeeds after the command that the message recommends (`_recover`).

`python -m tests.exhaustive --depth 3` runs all of it; `--sample N` takes each N-th cut; a failure prints the command
that repeats it. Folders with the same content are judged once: identifiers and times come from the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import vhdkit
from tests.exhaustive_verbs import (
    CHANGES_CONTENT,
    FOLDERS,
    KINDS,
    MAIN,
    NEW_LEAF,
    VERBS,
    Head,
    Kind,
    Unfit,
    World,
    write,
)
from tests.harness.folder_power import Cut, Files, FolderPower, files_of, fill, key_of, repeatable
from vhdkit.units import PAGE_SIZE, SECTOR_SIZE


class Wrong(AssertionError):
    """A disk does not read as it must, or the user cannot proceed."""


_MERGED_INTO = re.compile(r"was merged into (\S+): open that")


# -- folders and judging ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    """A folder, and the disks in it."""

    files: Files
    disks: dict[str, Head]
    verbs: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The same for states with the same content."""
        return key_of(self.files), tuple(sorted((name, head.path) for name, head in self.disks.items()))


def read(path: Path) -> bytes:
    """The content of a disk. Raises VhdkitError."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


def _is_one_of(found: bytes, before: bytes, after: bytes, mixed: bool) -> bool:
    if found in (before, after):
        return True
    if not mixed or len(found) not in (len(before), len(after)):
        return False
    size = len(found)
    before, after = before[:size].ljust(size, b"\0"), after[:size].ljust(size, b"\0")
    return all(
        found[at : at + SECTOR_SIZE] in (before[at : at + SECTOR_SIZE], after[at : at + SECTOR_SIZE])
        for at in range(0, size, SECTOR_SIZE)
    )


def _is_about_the_cut(error: vhdkit.VhdkitError) -> bool:
    """True for a refusal caused by a power cut; a base without a parent cannot be merged at any time."""
    return any(word in f"{error} {error.hint}" for word in ("interrupted", "--resume", "merge record", "undo"))


@dataclass
class Explorer:
    """The search. `sample` takes each n-th cut, `verbs` are those that are used."""

    base: Path
    seed: str = "1"
    sample: int = 1
    after_sample: int = 1
    verbs: Sequence[str] = tuple(VERBS)
    deadline: float | None = None
    keep_going: bool = False
    kind: Kind = KINDS["vhd"]
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _judged: set[object] = field(default_factory=set)
    _turn: int = 0

    def start(self) -> State:
        """A base with content, and a child with a few changes."""
        folder = self.base / "here"
        fill(folder, {}, FOLDERS)
        with repeatable(f"{self.seed} start"):
            kind = self.kind
            size, block = kind.disk_size_bytes, kind.block_size_bytes
            base, leaf = (folder / "a" / f"disk{suffix}" for suffix in (kind.base_suffix, kind.child_suffix))
            vhdkit.create_image(base, size, disk_format=kind.disk_format, block_size_bytes=block)
            with vhdkit.open_disk(base, writable=True) as disk:
                disk.write(0, random.Random(self.seed).randbytes(40 * PAGE_SIZE))
                disk.write(size - 5 * SECTOR_SIZE, b"\x5a" * 4 * SECTOR_SIZE)
            vhdkit.create_child(leaf, base)
        world = World(folder, {MAIN: Head(str(leaf.relative_to(folder)), read(leaf))}, self.seed, kind)
        write(world)
        return State(files_of(folder), world.disks)

    def explore(self, depth: int, *, first: Sequence[str] = ()) -> None:
        """Breadth first: all sequences of up to so many verbs that begin with one of `first`. Raises Wrong."""
        level, known = [self.start()], set()
        for number in range(depth):
            following = []
            for state in level:
                for verb in self.verbs if number or not first else first:
                    after = self.step(state, verb, f"{self.seed} {number}")
                    if after is not None and after.key not in known:
                        known.add(after.key)
                        following.append(after)
                    if self.deadline is not None and time.monotonic() > self.deadline:
                        self.counts["stopped by the clock"] += 1
                        return
            level = following

    def step(self, state: State, verb: str, seed: str) -> State | None:
        """Run a verb, and judge every cut in it; returns the state after it, None if it does not apply or was
        refused."""
        folder = self.base / "here"
        fill(folder, state.files, FOLDERS)
        world = World(folder, dict(state.disks), seed, self.kind)
        power = FolderPower(folder, f"{seed} {verb}")
        try:
            with repeatable(seed):
                power.run(lambda: VERBS[verb](world))
        except Unfit:
            return None
        except vhdkit.VhdkitError as error:
            self.counts["refused"] += 1
            self._expect(folder, state.disks, (*state.verbs, verb), f"refused: {error}")
            return None
        self.counts["verbs"] += 1
        verbs = (*state.verbs, verb)
        self._expect(folder, world.disks, verbs, "done")
        done = State(files_of(folder), world.disks, verbs)
        for cut in power.cuts:
            self._turn += 1
            if self._turn % self.sample == 0:
                self.judge(state, verb, world.disks, cut)
        return done

    def judge(self, before: State, verb: str, after: dict[str, Head], cut: Cut) -> None:
        """Judge a folder after a cut: the content of the disks, then each verb as the next one. Raises Wrong."""
        key = (cut.key, verb, before.key)
        if key in self._judged:
            return
        self._judged.add(key)
        self.counts["cuts"] += 1
        where = f"{' '.join((*before.verbs, verb))} @ {cut.boundary}:{cut.kind}"
        folder = self.base / "here"
        fill(folder, cut.files, FOLDERS)
        disks = self._found(folder, before.disks, verb, after, where)
        if files_of(folder).keys() != cut.files.keys():
            raise Wrong(f"{where}: reading changed the folder")
        found = State(cut.files, disks, (*before.verbs, verb))
        for number, following in enumerate(self.verbs):
            if (self._turn + number) % self.after_sample == 0:
                try:
                    self._at_once(found, following, where)
                except Wrong as error:
                    if not self.keep_going:
                        raise
                    self.wrong.append(str(error))

    def _found(
        self, folder: Path, before: dict[str, Head], verb: str, after: dict[str, Head], where: str
    ) -> dict[str, Head]:
        """The disks in a folder after a cut, as the user would find them."""
        disks = {}
        for name, new in after.items():
            old = before.get(name)
            order = [new, old] if verb in NEW_LEAF or old is None else [old, new]
            heads = [head for head in order if head is not None and (folder / head.path).exists()]
            if not heads and old is None:
                continue  # a new disk that does not exist yet
            problems = []
            for head in heads:
                try:
                    content = read(folder / head.path)
                except vhdkit.VhdkitError as error:
                    problems.append(f"{head.path}: {error}")
                else:
                    mixed = verb in CHANGES_CONTENT or (old is not None and old.content != new.content)
                    if _is_one_of(content, (old or new).content, new.content, mixed):
                        disks[name] = Head(head.path, content)
                        break
                    problems.append(f"{head.path} reads otherwise")
                if verb != "relocate" and not (verb in NEW_LEAF or old is None):
                    break  # the old leaf, while it exists, is the disk
            else:
                if old is None:
                    continue
            if name not in disks:
                raise Wrong(f"{where}: the disk {name} is gone: {'; '.join(problems) or 'no file of it is there'}")
        return disks

    def _at_once(self, found: State, verb: str, where: str) -> None:
        """Run the next verb after the power cut, and again once the recommended command has been run."""
        folder = self.base / "here"  # one place for all: images hold absolute paths
        fill(folder, found.files, FOLDERS)
        self.counts["verbs after a cut"] += 1
        where = f"{where}, then {verb}"
        disks = dict(found.disks)
        refusal = self._try(folder, disks, verb, where)
        if refusal is not None:
            self.counts["refused after a cut"] += 1
            disks = self._recover(folder, disks, where)
            self._expect(folder, disks, (), f"{where}, recovered")
            again = self._try(folder, disks, verb, f"{where}, recovered")
            if again is not None and _is_about_the_cut(again):
                raise Wrong(f"{where}: the way out leads in a circle: {refusal}; then {again}")
        for name in list(disks):
            self._write(folder, disks, name, where)

    def _write(self, folder: Path, disks: dict[str, Head], name: str, where: str) -> None:
        """The disk can be written to: at once, or, if its leaf is another file now, or a command was recommended,
        after that."""
        refusal: vhdkit.VhdkitError | None = None
        for attempt in range(3):
            head = disks[name]
            try:
                with vhdkit.open_disk(folder / head.path, writable=True) as disk:
                    disk.write(0, head.content[:SECTOR_SIZE])
                return
            except vhdkit.VhdkitError as error:
                refusal = error
                self._follow(folder, disks, error)
                if disks[name] is not head:
                    continue
                if attempt or not _is_about_the_cut(error):
                    break
                disks.update(self._recover(folder, disks, where))
                self._expect(folder, disks, (), f"{where}, recovered")
        raise Wrong(f"{where}: in the end {name} cannot be written: {refusal}") from refusal

    def _try(self, folder: Path, disks: dict[str, Head], verb: str, where: str) -> vhdkit.VhdkitError | None:
        world = World(folder, dict(disks), f"{self.seed} after", self.kind)
        try:
            with repeatable(f"{self.seed} after"):
                VERBS[verb](world)
        except Unfit:
            return None
        except vhdkit.VhdkitError as error:
            self._follow(folder, disks, error)
            self._expect(folder, disks, (), f"{where}: refused ({error})")
            return error
        self._expect(folder, world.disks, (), where)
        disks.clear()
        disks.update(world.disks)
        return None

    def _follow(self, folder: Path, disks: dict[str, Head], error: vhdkit.VhdkitError) -> None:
        """A refusal may have finished a merge; then it says which image is the disk now."""
        merged = _MERGED_INTO.search(str(error))
        for name, head in disks.items():
            if merged and not (folder / head.path).exists():
                disks[name] = replace(head, path=str(Path(merged[1]).relative_to(folder)))

    def _recover(self, folder: Path, disks: dict[str, Head], where: str) -> dict[str, Head]:
        """Finish what is unfinished, as the messages say: `merge --resume`."""
        found = dict(disks)
        for path in sorted(folder.glob("*/*.*vhd*")):
            with contextlib.suppress(vhdkit.NotFound):
                if path.exists() and vhdkit.merge_under_way(path) is not None:
                    try:
                        done = vhdkit.resume_merge(path)
                    except vhdkit.VhdkitError as error:
                        raise Wrong(f"{where}: the way out is closed: {error}") from error
                    for name, head in found.items():
                        if not (folder / head.path).exists():
                            target = str(Path(done.target).relative_to(folder))
                            found[name] = replace(head, path=target)
        return found

    def _expect(self, folder: Path, disks: dict[str, Head], verbs: tuple[str, ...], what: str) -> None:
        """Each disk reads as it must."""
        for name, head in disks.items():
            path = folder / head.path
            try:
                content = read(path)
            except vhdkit.VhdkitError as error:
                raise Wrong(f"{' '.join(verbs)} {what}: {name} does not open: {error}") from error
            if content != head.content:
                raise Wrong(f"{' '.join(verbs)} {what}: {name} ({head.path}) reads otherwise")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, if there is one."""
    memory = Path("/dev/shm")
    base = Path(tempfile.mkdtemp(prefix="vhdkit-exhaustive-", dir=memory if memory.is_dir() else None))
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def main(words: Sequence[str] | None = None) -> int:
    """Explore, and report the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.exhaustive", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--sample", type=int, default=1, help="judge each n-th cut")
    parser.add_argument("--after-sample", type=int, default=1, help="after a cut try each n-th verb")
    parser.add_argument("--seed", default="1", help="another seed, other content, identifiers and torn pages")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--keep-going", action="store_true", help="list all that is wrong after a cut, not the first")
    parser.add_argument("--first", nargs="*", choices=VERBS, default=[], help="only sequences that begin so")
    parser.add_argument("--format", choices=KINDS, default="vhd")
    parser.add_argument("--verbs", nargs="*", choices=VERBS, default=list(VERBS))
    given = parser.parse_args(words)
    deadline = None if given.seconds is None else time.monotonic() + given.seconds
    with scratch() as base:
        explorer = Explorer(
            base, given.seed, given.sample, given.after_sample, given.verbs, deadline, given.keep_going,
            KINDS[given.format],
        )  # fmt: skip
        try:
            explorer.explore(given.depth, first=given.first)
        except Wrong as error:
            print(f"{error}\nseed {given.seed}, counted so far {dict(explorer.counts)}", file=sys.stderr)
            return 1
    for line in explorer.wrong:
        print(line, file=sys.stderr)
    print(f"seed {given.seed}: " + ", ".join(f"{count} {what}" for what, count in sorted(explorer.counts.items())))
    return 1 if explorer.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
