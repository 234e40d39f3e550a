# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED: a chain of hostile images ends in success or a `VhdkitError`, in bounded time and memory.

Fed: a folder of images (`fuzz.recipe` says how the input becomes one) with false names, ids and locators, in a real
temporary folder, beside decoys: links out of it, a pipe, a folder with an image's name, and outside it images with
the right ids. Tried: describe_chain, check, open_disk, reads, extents, snapshot, clone, collect_garbage,
repairing the leaf, and writing to it.

Also watched, through Python's audit events: nothing outside the allowed folders is opened or listed (but for the
folders above an image that is to be changed: its children are looked for there), nothing but the leaf is opened for
writing, and no pipe is opened at all.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from unittest import mock

from fuzz import recipe
from fuzz.loop import main
from fuzz.mutate import mutate_bytes
from vhdkit import VhdkitError, check, clone, collect_garbage, open_disk, repair, snapshot
from vhdkit.chain.names import marks
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.describe import describe_chain
from vhdkit.units import KIB

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LISTED = 64 * KIB
_TEXTS = (
    b"parent.vhd", b".\\parent.vhd", b"..\\outside\\parent.vhd", b"%O/parent.vhd", b"%R/parent.vhd", b"%R/../leaf.vhd",
    b"LINKDIR\\parent.vhd", b"linkdir\\PARENT.vhd", b"link.vhd", b"LINK.VHD", b"pipe.vhd", b"folder.vhd", b"leaf.vhd",
    b"/dev/zero", b"/dev/tty", b"/etc/passwd", b"/proc/self/mem", b"\\\\server\\share\\parent.vhd", b"C:\\parent.vhd",
    b"file:///%2e%2e/parent.vhd", b"file://localhost%R/parent.vhd", b"file://%O/parent.vhd", b"file:///a%00b", b"..",
    b"/", b".", b"", b"a/" * 5000, b"x" * 4000, b"a%00b", b"sub\\inner.vhd", b"SUB\\INNER.VHD", b"up/parent.vhd",
    b"\xed\xa0\x80", b"new\nline\x1b[31m.vhd", b"..\\leaf.vhd", b"loop/loop.vhd", b"*", b"~/parent.vhd", b"$HOME/x",
)  # fmt: skip


class Watch:
    """What Python opens and lists while armed. Audit hooks cannot be removed, so there is one, made once.

    An audit event has no word of `dir_fd`, so `os.open` is another function meanwhile, which says it.
    """

    def __init__(self) -> None:
        self.armed = False
        self.events: list[tuple[str, str, int]] = []
        self._beneath: int | None = None
        self._open = os.open
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if not self.armed or event not in ("open", "os.listdir", "os.scandir"):
            return
        path = os.curdir if args[0] is None else args[0]
        if isinstance(path, int):
            path = f"/proc/self/fd/{path}"
        if not isinstance(path, str | bytes | os.PathLike):
            return
        flags = args[2] if event == "open" and len(args) > 2 and isinstance(args[2], int) else 0
        self.events.append((event, place_of(os.fsdecode(path), flags, self._beneath), flags))

    def _open_beneath(
        self, path: str | bytes | os.PathLike[str], flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        self._beneath = dir_fd
        try:
            return self._open(path, flags, mode, dir_fd=dir_fd)
        finally:
            self._beneath = None

    def during(self, work: Callable[[], None]) -> list[tuple[str, str, int]]:
        """Do the work; returns what it touched, by its real place."""
        self.events = []
        self.armed = True
        try:
            with (
                mock.patch.object(os, "open", self._open_beneath),
                mock.patch.object(sys, "dont_write_bytecode", True),  # a module that is needed for the first time
            ):
                work()
        finally:
            self.armed = False
        return self.events


def place_of(path: str, flags: int, beneath: int | None) -> str:
    """Which file an open with these flags is about, now: without links, but for a last one that is not followed."""
    if beneath is not None:
        path = os.path.join(os.readlink(f"/proc/self/fd/{beneath}"), path)
    if flags & os.O_NOFOLLOW:
        folder, name = os.path.split(path)
        return os.path.join(os.path.realpath(folder), name)
    return os.path.realpath(path)


@cache
def _watch() -> Watch:
    return Watch()


@cache
def _base() -> Path:
    """A temporary folder of this process, with the decoys that no case changes; gone when the process ends."""
    base = Path(tempfile.mkdtemp(prefix="vhdkit-fuzz-")).resolve()
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for folder in ("outside", "extra"):
        (base / folder).mkdir()
        for number in range(recipe.IDS):
            name = "parent.vhd" if number == 2 else f"decoy{number}.vhd"
            decoy = recipe.Entry(kind=recipe.DYN, own_id=number)
            recipe.image(decoy, base, base).build().write(base / folder / name)
    return base


def _fresh_root() -> Path:
    """The allowed folder, empty but for its own decoys."""
    root = _base() / "allowed"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / "link.vhd").symlink_to("../outside/parent.vhd")
    (root / "linkdir").symlink_to("../outside")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    (root / "folder.vhd").mkdir()
    os.mkfifo(root / "pipe.vhd")
    return root


def target(data: bytes) -> None:
    """Make the folder, do with its leaf whatever a user could do, and look at what was touched."""
    wanted = recipe.parse(data)
    root = _fresh_root()
    leaf = recipe.build(wanted, root, _base() / "outside")
    extra = (str(_base() / "extra"),) if wanted.flags & recipe.ALLOW_EXTRA else ()
    options = OpenOptions(
        parent_dirs=extra,
        allow_raw_parent=bool(wanted.flags & recipe.ALLOW_RAW),
        lock=not wanted.flags & recipe.NO_LOCK,
    )
    path = str(leaf)
    allowed = [str(root), *extra]
    above = [str(folder) for folder in root.parents]
    for work in (_describe, _check, _read):
        _judge(_watch().during(partial(work, path, options)), allowed, None)
    _judge(_watch().during(partial(_plan, path, options)), allowed, None, above)
    _collect(root, path, options)
    if wanted.flags & recipe.WRITABLE:
        _judge(_watch().during(partial(_repair, path, options)), allowed, path, above)
        _judge(_watch().during(partial(_write, path, options)), allowed, path, above)


def _who_we_are() -> tuple[str, ...]:
    """What the kernel says of this process, which goes into the name of a file under construction."""
    return "/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid", f"/proc/{os.getpid()}/stat"


def _judge(
    events: list[tuple[str, str, int]], allowed: Sequence[str], leaf: str | None, above: Sequence[str] = ()
) -> None:
    """Nothing outside, nothing but the leaf for writing, no pipe.

    Whoever changes an image looks for children of it in the folders `above` it too, and at nothing below those.
    """
    for event, path, flags in events:
        inside = any(os.path.commonpath((path, folder)) == folder for folder in allowed)
        seen = inside or path in above or os.path.dirname(path) in above or path in _who_we_are()
        assert seen or path.endswith((".py", ".pyc")), f"{event} {path!r}: outside the allowed folders"
        may_write = leaf is not None and (path == leaf or _is_record(path, leaf) or (inside and _is_mark(path)))
        assert may_write or not flags & _WRITING, f"{event} {path!r} for writing"
        if event == "open" and not flags & os.O_PATH and os.path.exists(path):
            assert not stat.S_ISFIFO(os.stat(path).st_mode), f"{path!r} is a pipe"


def _is_mark(path: str) -> bool:
    """True for what a repaired child says of itself beside its parent, or a file on its way to be that."""
    name = os.path.basename(path)
    return name.endswith(f".vhdkit-{marks.KIND}") or (name.startswith(".vhdkit-") and name.endswith(".part"))


def _is_record(path: str, leaf: str) -> bool:
    """True for a record beside the leaf, or a file on its way to be one."""
    folder, name = os.path.split(path)
    return folder == os.path.dirname(leaf) and name.startswith((".vhdkit-", ".leaf.vhd.vhdkit-"))


def _plan(path: str, options: OpenOptions) -> None:
    """What changes files, as far as it goes without changing any."""
    for plan in (partial(repair, path), partial(snapshot, path), partial(clone, path, [path + ".clone"])):
        try:
            plan(options=options, dry_run=True)
        except VhdkitError as error:
            assert str(error).isprintable(), repr(str(error))


def _repair(path: str, options: OpenOptions) -> None:
    try:
        done = repair(path, accept_data_loss=True, writer_is_dead=True, report=path + ".lost", options=options)
        assert all(fix.message.isprintable() for fix in done.fixes)
    except VhdkitError as error:
        assert str(error).isprintable(), repr(str(error))


def _collect(root: Path, path: str, options: OpenOptions) -> None:
    """Looks into the folders around, too, so only its end is watched."""
    try:
        for item in collect_garbage(root, [path], options=options):
            assert item.kept is None or item.kept.isprintable(), repr(item.kept)
    except VhdkitError as error:
        assert str(error).isprintable(), repr(str(error))


def _describe(path: str, options: OpenOptions) -> None:
    try:
        chain = describe_chain(path, options=options)
    except VhdkitError as error:
        assert str(error).isprintable(), repr(str(error))
    else:
        assert 0 < len(chain.layers) <= recipe.MAX_FILES + 2 * recipe.IDS + 2, f"{len(chain.layers)} layers told"


def _check(path: str, options: OpenOptions) -> None:
    for finding in check(path, options=options):
        assert str(finding).isprintable(), repr(str(finding))


def _read(path: str, options: OpenOptions) -> None:
    try:
        with open_disk(path, options=options) as disk:
            size = min(disk.size_bytes, _LISTED)
            disk.read(0, size)
            disk.read(disk.size_bytes - size, size)
            assert sum(one.size_bytes for one in disk.extents(find_holes=True)) == disk.size_bytes
    except VhdkitError as error:
        assert str(error).isprintable(), repr(str(error))


def _write(path: str, options: OpenOptions) -> None:
    try:
        with open_disk(path, writable=True, options=options) as disk:
            disk.write(100, b"written")
            assert disk.read(100, 7) == b"written"
    except VhdkitError as error:
        assert str(error).isprintable(), repr(str(error))


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Another folder, near `data`: mostly changed by the grammar, so that names and ids still meet now and then."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng, others)
    one = recipe.parse(data)
    if rng.random() < 0.1:
        one.entries += recipe.parse(rng.choice(others)).entries
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        _change(one, rng.choice(one.entries), rng)
    one.entries = one.entries[: recipe.MAX_FILES]
    return one.encode()


def _change(whole: recipe.Recipe, one: recipe.Entry, rng: random.Random) -> None:
    kind = rng.randrange(9)
    if kind == 0:
        whole.flags = rng.randrange(16)
    elif kind == 1:
        one.parent_id = rng.choice([other.own_id for other in whole.entries] + [rng.randrange(recipe.IDS)])
    elif kind == 2:
        one.own_id = rng.randrange(recipe.IDS)
    elif kind == 3:
        one.kind, one.shape = rng.choice((recipe.DIFF, rng.randrange(recipe.KINDS))), rng.randrange(256)
    elif kind == 4:
        one.name = rng.randrange(len(recipe.NAMES))
    elif kind == 5:
        one.parent_name = rng.choice((rng.choice(_TEXTS)[:250], one.path.encode()))
    elif kind == 6 and len(one.links) < 8:
        names = [other.path.encode() for other in whole.entries]
        text = rng.choice((rng.choice(_TEXTS), rng.choice(names).swapcase(), rng.choice(names)))
        one.links.append(recipe.Link(rng.randrange(len(recipe.CODES)), text, rng.choice((0, 0, 0, 1, 2, 3))))
    elif kind == 7 and one.links:
        one.links.pop(rng.randrange(len(one.links)))
    elif len(one.patches) < 3:
        one.patches.append(
            (rng.choice((60, 552, 1088 + 24 * rng.randrange(8), rng.randrange(4096))), rng.randbytes(4))
        )


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_chain", mutate))
