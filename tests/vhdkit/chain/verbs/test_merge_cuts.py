# SPDX-License-Identifier: Apache-2.0
"""Merges of real files in every format, whose power is cut or whose process is killed: links, ids and names hold.

`test_merge_power.py` cuts inside single writes, in memory. Here the code that names files in records and repoints
images runs as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import vhdkit
from tests.harness.folder_power import Cut, FolderPower, files_of, fill, repeatable
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vhdkit.chain.verbs.test_merge import FAMILIES, Family, content
from vhdkit import formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.records.intent import Named
from vhdkit.chain.verbs.live_merge import live_merge
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.image import Layer
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE

SIZE = 2 * MIB
_WHOLE = pytest.mark.nightly


def names_in(family: Family) -> list[str]:
    """Leaf, middle, base."""
    return [family.child("leaf"), family.child("middle"), family.base]


def make_smaller(path: Path, size_bytes: int) -> None:
    """Give a VHDX another size without a change of anything else, as a program that resizes only leaves would."""
    with FileStore.open(path, writable=True) as store:
        (item,) = (one for one in read_metadata(store).items.all if one.entry.item_id == layout.ITEM_VIRTUAL_DISK_SIZE)
        store.pwrite(item.offset_bytes, size_bytes.to_bytes(8, "little"))


def write_chain(folder: Path, family: Family, *, relink: bool, leaf_bytes: int | None = None) -> list[str]:
    """Make a chain of three, leaf first, each with its own data and zeros; with `relink` the leaf has two children.

    If `leaf_bytes` is given, the leaf has that size, and those below it are larger and have data in what it lacks.
    """
    names = names_in(family)
    size = SIZE if leaf_bytes is None else 2 * SIZE
    vhdkit.create_image(folder / names[-1], size, disk_format=family.kind, block_size_bytes=family.block_size_bytes)
    for number in reversed(range(len(names))):
        if number < len(names) - 1:
            vhdkit.create_child(folder / names[number], folder / names[number + 1])
        with vhdkit.open_disk(folder / names[number], writable=True) as disk:
            disk.write(number * SECTOR_SIZE * 3, bytes([65 + number]) * 9 * SECTOR_SIZE)
            disk.write((number % 2) * MIB + 70_000, bytes([97 + number]) * 5000)
            if number == 0:
                disk.write_zeroes(70_000, 700)
            elif leaf_bytes is not None:
                disk.write(leaf_bytes - 5000, b"past the end" * 2000)
                disk.write(size - 5000, b"lost" * 1000)
    if leaf_bytes is not None:
        make_smaller(folder / names[0], leaf_bytes)
    if relink:
        for number in range(2):
            vhdkit.create_child(folder / family.child(f"other{number}"), folder / names[0])
    return names


def links_hold(folder: Path, names: list[str], into: int, expected: bytes) -> None:
    """The leaf, or if it is gone the merge's target, and each child of it read as before."""
    leaf = folder / names[0]
    for path in (leaf if leaf.exists() else folder / names[into], *folder.glob("other*")):
        assert content(path) == expected, path


def cut_everywhere(
    place: Path, family: Family, into: int, relink: bool, *, every: int, leaf_bytes: int | None = None
) -> tuple[int, int]:
    """Cut the power inside a merge and inside its resumption; returns how many cuts of each were judged."""
    work, found, again = (place / name for name in ("work", "found", "again"))
    work.mkdir()
    with repeatable("made"):
        names = write_chain(work, family, relink=relink, leaf_bytes=leaf_bytes)
    expected, counts = content(work / names[0]), [0, 0]

    def resume(folder: Path) -> None:
        if vhdkit.merge_under_way(folder / names[into]) is not None:
            vhdkit.resume_merge(folder / names[into])

    def judge_again(cut: Cut) -> None:
        counts[1] += 1
        fill(again, cut.files)
        links_hold(again, names, into, expected)
        resume(again)
        links_hold(again, names, into, expected)
        assert (again / names[0]).exists() or vhdkit.merge_under_way(again / names[into]) is None

    def judge(cut: Cut) -> None:
        counts[0] += 1
        fill(found, cut.files)
        links_hold(found, names, into, expected)
        seldom = every * random.Random(counts[0]).choice((5, 7, 11))
        FolderPower(found, f"resume {counts[0]}", judge=judge_again, every=seldom).run(lambda: resume(found))
        links_hold(found, names, into, expected)

    with repeatable("merge"):
        FolderPower(work, f"merge {into}", judge=judge, every=every).run(
            lambda: vhdkit.merge(work / names[0], into=work / names[into], relink_children=relink)
        )
    assert not (work / names[0]).exists()
    links_hold(work, names, into, expected)
    return counts[0], counts[1]


@pytest.mark.parametrize(
    ("name", "into", "relink"),
    [
        pytest.param("vhd", 2, True, marks=_WHOLE),
        pytest.param("vhdx", 1, False, marks=_WHOLE),
        pytest.param("vhdx", 1, True, marks=_WHOLE),
        pytest.param("vhdx", 2, False, marks=_WHOLE),
        ("vhdx", 2, True),
    ],
)
def test_every_cut_of_a_merge_leaves_valid_links(name: str, into: int, relink: bool, tmp_path: Path) -> None:
    """INV-MERGE-PRESERVES: wherever the power is cut in a merge whose target may get another id, every image finds
    its parent and reads as before; the merge is then resumed, cut again, and resumed to its end."""
    first, second = cut_everywhere(tmp_path, FAMILIES[name], into, relink, every=daily_or_nightly(19, 1))
    assert first > daily_or_nightly(4, 20) and second >= daily_or_nightly(0, 5)


@pytest.mark.parametrize(
    ("into", "relink"), [(2, False), pytest.param(2, True, marks=_WHOLE), pytest.param(1, True, marks=_WHOLE)]
)
def test_every_cut_of_a_merge_that_shrinks_its_target(into: int, relink: bool, tmp_path: Path) -> None:
    """INV-MERGE-PRESERVES, INV-RESIZE-WHOLE: a VHDX that takes in a smaller leaf gets its size, and nothing past it.

    When the disk grows again, none of the data that lay there comes back.
    """
    size, family = MIB + 40 * KIB, FAMILIES["vhdx"]
    first, second = cut_everywhere(tmp_path, family, into, relink, every=daily_or_nightly(7, 1), leaf_bytes=size)
    assert first > daily_or_nightly(4, 20) and second >= daily_or_nightly(0, 5)
    target = tmp_path / "work" / names_in(family)[into]
    assert {one.code for one in vhdkit.check(target)} == (set() if into == 2 else {"chain-size"})
    if not relink:
        vhdkit.resize(target, 4 * MIB)
        assert content(target)[size:] == bytes(4 * MIB - size)


def target_first(child: FileStore, target: Layer, named: Named) -> None:
    """`accept_renewed_id` in the wrong order: the target gets its id before the layer above accepts it."""
    assert isinstance(target, VhdxImage) and named.renewed_id is not None and target._commit is not None
    target.set_renewed_id(named.renewed_id)
    target._commit.change_begins()
    parent = formats.of(target).facts(child).parent
    assert parent is not None
    with FileStore.open(child.name, writable=True) as store:
        formats.of(target).relink(store, replace(parent, linkage_ids=named.ids))


@pytest.mark.parametrize("accept", [target_first, lambda child, target, named: None], ids=["swapped", "never"])
def test_an_id_that_is_accepted_too_late_is_caught(
    accept: Callable[[FileStore, Layer, Named], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Self-test: if the target got its new id before the layer above it recorded that, a cut in between would leave a
    chain that does not open."""
    monkeypatch.setattr("vhdkit.chain.verbs.merge_in_place.accept_renewed_id", accept)
    with pytest.raises(vhdkit.ParentError):
        cut_everywhere(tmp_path, FAMILIES["vhdx"], 1, False, every=1)


@pytest.mark.parametrize("name", [pytest.param("vhd", marks=_WHOLE), "vhdx"])
def test_every_kill_of_a_merge_can_be_resumed(name: str, tmp_path: Path) -> None:
    """INV-MERGE-PRESERVES, INV-RECORD-PROVEN: after a kill at any call that changes a file, the leaf can be written to
    while data was still being copied, and the merge is finished from its record, also when that is killed, too."""
    family, work, rng = FAMILIES[name], tmp_path / "work", random.Random(name)
    work.mkdir()
    names = write_chain(work, family, relink=False)
    start, count = files_of(work), 0
    leaf, target = work / names[0], work / names[2]
    before = content(leaf)

    def merged() -> None:
        vhdkit.merge(leaf, into=target)

    def resumed() -> None:
        if vhdkit.merge_under_way(target) is not None:
            vhdkit.resume_merge(target)

    for number in killings(merged, step=daily_or_nightly(13, 1)):
        count += 1
        expected = before
        if number > 0 and rng.random() < 0.5 and _is_writable(leaf):
            with vhdkit.open_disk(leaf, writable=True) as disk:
                disk.write(MIB + SECTOR_SIZE * 7, b"later" * 1000)
            expected = content(leaf)
        for _ in killings(resumed, step=rng.randint(11, 17) * daily_or_nightly(3, 1)):
            links_hold(work, names, 2, expected)
        links_hold(work, names, 2, expected)
        assert number > 0 or not leaf.exists()
        fill(work, start)
    assert count > daily_or_nightly(3, 20)


def _is_writable(leaf: Path) -> bool:
    """False if a writable open would finish the merge."""
    try:
        vhdkit.open_disk(leaf, writable=True).close()
    except vhdkit.NotFound:
        return False
    return True


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["vhdx"])
def test_every_kill_of_a_live_merge_leaves_valid_links(name: str, first: int, tmp_path: Path) -> None:
    """INV-MERGE-PRESERVES: a server that dies anywhere in a live merge leaves a chain in which every image finds its
    parent; what the leaf had flushed is there, and the merge is resumed."""
    family, work = FAMILIES[name], tmp_path / "work"
    work.mkdir()
    names = write_chain(work, family, relink=False)
    start, expected = files_of(work), content(work / names[0])
    target = work / names[first + 1]

    def served() -> None:
        chain = Chain.open(work / names[0], writable=True)
        with live_merge(chain, first, first + 1) as merging:
            merging.copy()
            chain, problem = merging.exchange()
            assert problem is None
            merging.done()
        chain.close()

    count = 0
    for _ in killings(served, step=daily_or_nightly(13, 1)):
        count += 1
        links_hold(work, names, first + 1, expected)
        if vhdkit.merge_under_way(target) is not None:
            vhdkit.resume_merge(target)
            links_hold(work, names, first + 1, expected)
        fill(work, start)
    assert count > daily_or_nightly(2, 20)
