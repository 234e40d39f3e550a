# SPDX-License-Identifier: Apache-2.0
"""Merges of real files: what is refused, what is left, and how a merge continues after a failure at every step."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import vhdkit
from tests.harness.merging import unaligned
from tests.harness.model import ParsedVhd
from tests.harness.stores import MemStore
from tests.harness.vhd_builder import seal_footer
from vhdkit import DiskFormat, errors
from vhdkit.chain.verbs.describe import describe_image
from vhdkit.chain.verbs.merge_steps import RealNames
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.units import GIB, KIB, MIB, PAGE_SIZE, SECTOR_SIZE, round_up

SIZE = 6 * MIB + 37 * SECTOR_SIZE
BLOCK = 512 * KIB


@dataclass(frozen=True)
class Family:
    """Images of one format: the kind of a base, their names, their block size, and the class of an open one."""

    kind: DiskFormat
    base_suffix: str
    child_suffix: str
    block_size_bytes: int
    layer_class: type[DynamicImage] | type[VhdxImage]

    @property
    def base(self) -> str:
        """The name of a base."""
        return f"base{self.base_suffix}"

    def child(self, stem: str) -> str:
        """The name of a child."""
        return f"{stem}{self.child_suffix}"


FAMILIES = {
    "vhd": Family(DiskFormat.DYNAMIC, ".vhd", ".avhd", BLOCK, DynamicImage),
    "vhdx": Family(DiskFormat.VHDX, ".vhdx", ".avhdx", MIB, VhdxImage),
}
families = [FAMILIES["vhd"]]  # of the images that `make_chain` makes, the last one


def family() -> Family:
    """The format of this test."""
    return families[-1]


@pytest.fixture(params=FAMILIES)
def each_format(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs once for each format."""
    families.append(FAMILIES[request.param])
    yield
    families.pop()


@pytest.fixture(params=["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)])
def each_format_nightly(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same for matrices: every day only VHD."""
    families.append(FAMILIES[request.param])
    yield
    families.pop()


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, seed: int, *, writes: int = 12, zeros: int = 3) -> None:
    """Write random data and zeros into the image's own disk."""
    rng = random.Random(seed)
    with vhdkit.open_disk(path, writable=True) as disk:
        for _ in range(writes):
            size = rng.choice((SECTOR_SIZE, 5000, 70_000, BLOCK))
            disk.write(rng.randrange(disk.size_bytes - size), rng.randbytes(size))
        for _ in range(zeros):
            size = rng.choice((SECTOR_SIZE, 9000, BLOCK))
            disk.write_zeroes(rng.randrange(disk.size_bytes - size), size)


BASES = (DiskFormat.RAW, DiskFormat.FIXED, DiskFormat.DYNAMIC)


def make_chain(depth: int, *, base: DiskFormat = DiskFormat.DYNAMIC, size: int = SIZE) -> list[str]:
    """Make `layer0` (the leaf) to the base, each with its own data; return the paths, leaf first."""
    block, made = family().block_size_bytes, base
    if family() is FAMILIES["vhdx"]:
        assert base is DiskFormat.DYNAMIC
        made, size = DiskFormat.VHDX, size // PAGE_SIZE * PAGE_SIZE
    names = [family().child(f"layer{n}") for n in range(depth - 1)]
    names.append("base.img" if base is DiskFormat.RAW else family().base)
    vhdkit.create_image(names[-1], size, disk_format=made, block_size_bytes=block)
    write(names[-1], depth)
    for number in reversed(range(depth - 1)):
        vhdkit.create_child(names[number], names[number + 1], block_size_bytes=block, options=RAW)
        write_with_raw(names[number], number)
    return names


RAW = vhdkit.OpenOptions(allow_raw_parent=True)


def write_with_raw(path: str, seed: int) -> None:
    """`write` for a child of a raw base, too."""
    rng = random.Random(f"child {seed}")
    with vhdkit.open_disk(path, writable=True, options=RAW) as disk:
        for _ in range(12):
            size = rng.choice((SECTOR_SIZE, 5000, 70_000, BLOCK))
            disk.write(rng.randrange(disk.size_bytes - size), rng.randbytes(size))
        disk.write_zeroes(rng.randrange(disk.size_bytes - BLOCK), BLOCK)


def content(path: str | Path) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path, options=RAW) as disk:
        return disk.read(0, disk.size_bytes)


def files() -> list[str]:
    """Every name in the folder, hidden files included."""
    return sorted(os.listdir())


# -- results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_a_child_is_merged_into_its_parent(base: DiskFormat) -> None:
    """INV-MERGE-PRESERVES: the parent reads as the child did; only the child is removed."""
    leaf, parent = make_chain(2, base=base)
    before = content(leaf)
    done = vhdkit.merge(leaf, options=RAW)
    assert files() == [parent]
    assert content(parent) == before
    assert (done.target, done.removed) == (os.path.realpath(parent), (os.path.realpath(leaf),))
    assert done.size_bytes == SIZE and done.data_bytes > 0 and done.zero_bytes > 0
    assert not [one for one in vhdkit.check(parent) if one.severity > vhdkit.Severity.NOTE]


@pytest.mark.usefixtures("each_format")
def test_merges_multiple_children_in_one_pass() -> None:
    """XO 'merges multiple children in one pass': five layers into the base at once; only the base is left."""
    names = make_chain(6)
    before = content(names[0])
    done = vhdkit.merge(names[0], into=names[-1])
    assert files() == [names[-1]] and content(names[-1]) == before
    assert len(done.merged) == 5


@pytest.mark.usefixtures("each_format")
def test_into_a_layer_in_the_middle() -> None:
    """A differencing ancestor takes the layers and keeps its own parent, which does not change."""
    names = make_chain(5)
    before, base = content(names[0]), Path(names[-1]).read_bytes()
    vhdkit.merge(names[0], into=names[2])
    assert files() == sorted([names[2], names[3], names[4]])
    assert content(names[2]) == before and Path(names[-1]).read_bytes() == base


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("depth", [1, 2])
def test_to_a_new_file(base: DiskFormat, depth: int) -> None:
    """The result is made beside the chain, with the kind of the ancestor and, if that has one, its parent; no file of
    the chain changes."""
    names = make_chain(3, base=base)
    before = {name: Path(name).read_bytes() for name in names}
    new = "new.img" if depth == 2 and base is DiskFormat.RAW else "new.vhd"
    done = vhdkit.merge(names[0], into=names[depth], to=new, options=RAW)
    assert content(new) == content(names[0]) and done.removed == ()
    assert {name: Path(name).read_bytes() for name in names} == before
    kind = describe_image(new, options=RAW)
    assert kind.kind == (base.value if depth == 2 else "differencing")
    if depth == 1:
        assert kind.parent is not None and kind.parent.path == os.path.realpath(names[2])
    with pytest.raises(errors.AlreadyExists):
        vhdkit.merge(names[0], to=new, options=RAW)


@pytest.mark.usefixtures("each_format")
def test_a_dry_run_changes_nothing() -> None:
    """It reports what the merge would report, and no byte and no name changes."""
    names = make_chain(3)
    before = {name: Path(name).read_bytes() for name in names}
    planned = vhdkit.merge(names[0], into=names[2], dry_run=True)
    vhdkit.merge(names[0], into=names[2], to=f"new{family().base_suffix}", dry_run=True)
    assert {name: Path(name).read_bytes() for name in files()} == before
    assert vhdkit.merge(names[0], into=names[2]) == planned


def test_a_raw_base_that_ends_inside_a_sector() -> None:
    """Its last sector counts as a whole one that ends in zeros, also in the target."""
    Path("base.img").write_bytes(os.urandom(2 * MIB - 100))
    vhdkit.create_child("leaf.avhd", "base.img", block_size_bytes=BLOCK, options=RAW)
    before = content("leaf.avhd")
    vhdkit.merge("leaf.avhd", to="new.img", options=RAW)
    assert content("new.img") == before and len(before) == 2 * MIB
    vhdkit.merge("leaf.avhd", options=RAW)
    assert content("base.img") == before


def test_blocks_can_be_moved() -> None:
    """XO 'blocks can be moved': a complete but unaligned block moves to an aligned place and leaves a hole."""
    leaf, base = make_chain(2)
    store = MemStore("base.vhd")
    store.pwrite(0, Path(base).read_bytes())
    Path(base).write_bytes(unaligned(store).contents())
    before, aligned = content(leaf), 0
    vhdkit.merge(leaf)
    store = MemStore("base.vhd")
    store.pwrite(0, Path(base).read_bytes())
    parsed = ParsedVhd.parse(store)
    for entry in parsed.entries:
        aligned += entry != 0xFFFFFFFF and (entry * SECTOR_SIZE + parsed.bitmap_bytes) % 4096 == 0
    assert aligned > 3 and content(base) == before and not parsed.overlaps()


def test_does_not_use_the_bat_msb_for_sign() -> None:
    """XO 'does not use the BAT MSB for sign': a target with a block behind 1 TiB of its file."""
    leaf, base = make_chain(2)
    before = content(leaf)
    raw = bytearray(Path(base).read_bytes())
    footer, place = raw[:SECTOR_SIZE], 1536 * GIB
    store = MemStore("base.vhd")
    store.pwrite(0, raw)
    parsed = ParsedVhd.parse(store)
    block = next(number for number, entry in enumerate(parsed.entries) if entry != 0xFFFFFFFF)
    start = parsed.entries[block] * SECTOR_SIZE
    try:
        with open(base, "r+b") as file:
            file.seek(place)
            file.write(raw[start : start + parsed.bitmap_bytes + BLOCK] + footer)
            file.seek(parsed.table_offset_bytes + 4 * block)
            file.write((place // SECTOR_SIZE).to_bytes(4, "big"))
    except OSError:
        pytest.skip("this file system has no files of 1.5 TiB")
    assert content(leaf) == before
    vhdkit.merge(leaf)
    assert content(base) == before


def test_last_block_is_trimmed_when_the_size_is_not_a_multiple_of_the_block_size() -> None:
    """XO 'last block is trimmed when virtualSize is not a multiple of blockSize': data up to the last sector."""
    leaf, base = make_chain(2)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(SIZE - 40 * SECTOR_SIZE, b"end!" * 128 * 40)
    before = content(leaf)
    vhdkit.merge(leaf)
    assert content(base) == before and before.endswith(b"end!")


def test_an_ancestor_that_lost_its_footer() -> None:
    """XO 'resumes an interrupted merge whose ancestor lost its footer': the copy at the start is enough."""
    leaf, base = make_chain(2)
    before = content(leaf)
    os.truncate(base, os.path.getsize(base) - SECTOR_SIZE)
    vhdkit.merge(leaf)
    assert content(base) == before and vhdkit.check(base) == []


@pytest.mark.parametrize("base", [*BASES, DiskFormat.VHDX])
@pytest.mark.parametrize("grown", [SECTOR_SIZE, 5 * MIB + 3 * SECTOR_SIZE, 3 * GIB])
def test_merge_a_bigger_child_into_a_parent(base: DiskFormat, grown: int) -> None:
    """XO 'merge a bigger child into a parent': the parent first gets the leaf's size, then its data."""
    block, size = (MIB, round_up(SIZE, PAGE_SIZE)) if base is DiskFormat.VHDX else (BLOCK, SIZE)
    if base is DiskFormat.VHDX:
        grown = round_up(grown, PAGE_SIZE)
    vhdkit.create_image("base", size, disk_format=base, block_size_bytes=block)
    write("base", 3)
    vhdkit.create_child("leaf.avhd", "base", size_bytes=size + grown, block_size_bytes=block, options=RAW)
    with vhdkit.open_disk("leaf.avhd", writable=True, options=RAW) as disk:
        disk.write(size - 5000, b"over the old end" * 300)
        disk.write(size + grown - SECTOR_SIZE, b"last" * 128)
        head, tail = disk.read(0, size), disk.read(size, grown if grown < GIB else MIB)
    done = vhdkit.merge("leaf.avhd", options=RAW)
    assert files() == ["base"] and done.size_bytes == size + grown
    with vhdkit.open_disk("base") as disk:
        assert disk.size_bytes == size + grown
        assert disk.read(0, size) == head and disk.read(size, len(tail)) == tail
        assert disk.read(size + grown - SECTOR_SIZE, SECTOR_SIZE) == b"last" * 128
    assert not [one for one in vhdkit.check("base") if one.severity is vhdkit.Severity.ERROR]


def smaller_leaf(base: DiskFormat, size: int) -> bytes:
    """A chain of two whose leaf is smaller than its base, as some programs make them; returns the leaf's content."""
    vhdkit.create_image("base", SIZE, disk_format=base, block_size_bytes=BLOCK)
    write("base", 3)
    vhdkit.create_child("leaf.avhd", "base", block_size_bytes=BLOCK, options=RAW)
    write_with_raw("leaf.avhd", 4)
    with open("leaf.avhd", "r+b") as file:
        footer = bytearray(file.read(SECTOR_SIZE))
        footer[48:56] = size.to_bytes(8, "big")
        for place in (0, os.path.getsize("leaf.avhd") - SECTOR_SIZE):
            file.seek(place)
            file.write(seal_footer(bytes(footer)))
    return content("leaf.avhd")


@pytest.mark.parametrize("base", BASES)
def test_a_smaller_child_makes_its_parent_smaller(base: DiskFormat) -> None:
    """The result has the leaf's size even if that is smaller: what the leaf does not show is not kept."""
    before = smaller_leaf(base, 2 * MIB + 5 * SECTOR_SIZE)
    vhdkit.merge("leaf.avhd", options=RAW)
    assert files() == ["base"] and content("base") == before
    assert not [one for one in vhdkit.check("base") if one.severity is vhdkit.Severity.ERROR]


def test_a_target_that_hides_its_parents_data_does_not_grow() -> None:
    """A target smaller than its parent and than the leaf would expose its parent's data behind its end: refused."""
    smaller_leaf(DiskFormat.DYNAMIC, 2 * MIB)
    os.rename("leaf.avhd", "target.avhd")
    vhdkit.create_child("layer0.avhd", "target.avhd", size_bytes=SIZE)
    refused(errors.InvalidArgument, "would appear")


# -- refusals ----------------------------------------------------------------------------------------------------


def refused(kind: type[errors.VhdkitError], match: str, **words: object) -> None:
    """The merge of layer0 raises this error, and nothing changes."""
    before = {name: Path(name).read_bytes() for name in files()}
    with pytest.raises(kind, match=match):
        vhdkit.merge(family().child("layer0"), **words)  # type: ignore[arg-type]
    assert {name: Path(name).read_bytes() for name in files()} == before


@pytest.mark.parametrize("parent", [0, 1, 2, 3])
@pytest.mark.usefixtures("each_format")
def test_another_child_is_refused(parent: int) -> None:
    """A child of the leaf, a source or the target would be broken: the error names it, and nothing changes."""
    names = make_chain(4)
    vhdkit.create_child(family().child("other"), names[parent])
    refused(errors.HasChildren, family().child("other"), into=names[3])


@pytest.mark.usefixtures("each_format")
def test_a_child_in_another_folder_is_found_where_the_user_points() -> None:
    """Children are searched in the folders of all the images and in those that the user names."""
    names = make_chain(2)
    os.mkdir("elsewhere")
    here = vhdkit.OpenOptions(parent_dirs=("elsewhere", "."))
    vhdkit.create_child(family().child("elsewhere/other"), names[1])
    with pytest.raises(errors.HasChildren, match="other"):
        vhdkit.merge(names[0], options=here)


@pytest.mark.usefixtures("each_format")
def test_children_of_the_leaf_are_relinked_on_request() -> None:
    """With relink_children their parent is the target afterwards, and they read as before."""
    names = make_chain(3)
    children = [family().child("child1"), family().child("child2")]
    for child in children:
        vhdkit.create_child(child, names[0])
        write(child, len(child))
    before = {child: content(child) for child in children}
    refused(errors.HasChildren, "relink")
    done = vhdkit.merge(names[0], into=names[2], relink_children=True)
    assert files() == sorted([names[2], *children])
    assert {child: content(child) for child in children} == before
    assert [os.path.basename(path) for path in done.relinked] == children


@pytest.mark.usefixtures("each_format")
def test_an_image_in_use_is_not_merged() -> None:
    """Any image of the chain that is open prevents the merge, and so does an open child to be relinked."""
    names = make_chain(3)
    for name in names:
        with vhdkit.open_disk(name):
            refused(errors.ImageInUse, "another program", into=names[2])
    vhdkit.create_child(family().child("child"), names[0])
    with vhdkit.open_disk(family().child("child"), writable=True), pytest.raises(errors.ImageInUse):
        vhdkit.merge(names[0], relink_children=True)


def test_invalid_merges() -> None:
    """No parent, itself, not an ancestor, children to be relinked to a new file: each is a clear error."""
    names = make_chain(2)
    vhdkit.create_image("other.vhd", SIZE)
    refused(errors.InvalidArgument, "is not an ancestor", into="other.vhd")
    refused(errors.InvalidArgument, "into itself", into=names[0])
    refused(errors.InvalidArgument, "cannot be repointed", to="new.vhd", relink_children=True)
    with pytest.raises(errors.InvalidArgument, match="has no parent"):
        vhdkit.merge("other.vhd")
    with pytest.raises(errors.NotFound):
        vhdkit.merge("gone.avhd")


# -- interruptions -----------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """The process ends here; not an `Exception`, so no handler takes it for a failure."""


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The merge stops before its n-th change of a name or the record."""
    seen = 0

    def counted(honest: Callable[..., None]) -> Callable[..., None]:
        def step(*words: object) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                raise Stopped
            honest(*words)

        return step

    for name in ("write", "remove_record", "remove"):
        monkeypatch.setattr(RealNames, name, counted(getattr(RealNames, name)))


def stopped(monkeypatch: pytest.MonkeyPatch, names: list[str], step: int) -> None:
    """A merge of the whole chain that stopped before its n-th step."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        vhdkit.merge(names[0], into=names[-1])
