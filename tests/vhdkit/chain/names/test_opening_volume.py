# SPDX-License-Identifier: Apache-2.0
"""Chains on a volume that is not a file system: opened, read and searched by the same code, with the same errors.

The volume is `tests.harness.memory_volume`, which is unknown to the packages. Most tests also make real files of what
is in memory, at the same places, and expect the same result from both.
"""

from __future__ import annotations

import ntpath
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.memory_volume import MemoryVolume
from tests.harness.sparse_format import SPARSE
from tests.memory_images import SIZE, image, reference, without_files
from vhdkit import errors, formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names import opening
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import leads_to
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import Intent, Named, Phase, record_of
from vhdkit.chain.verbs import check, describe
from vhdkit.chain.verbs.check import check_on
from vhdkit.chain.verbs.describe import describe_chain_on
from vhdkit.disk import Disk
from vhdkit.formats.undo import apply_change, encode, plan_change
from vhdkit.image import NameDialect, ParentName, ParentRef
from vhdkit.local_volume import LOCAL
from vhdkit.units import SECTOR_SIZE, whole_sectors
from vhdkit.volume import Volume


def test_looking_at_a_file_is_noticed(tmp_path: Path) -> None:
    """Self-test: each call to the file system fails in the block that forbids them."""
    (tmp_path / "file").touch()

    def listed(place: str) -> list[str]:
        return list(LOCAL.siblings(os.path.dirname(place)))

    asked: tuple[Callable[[str], object], ...] = (LOCAL.real, LOCAL.exists, LOCAL.open, LOCAL.open_regular, listed)
    for question in asked:
        with without_files(), pytest.raises(AssertionError, match="the file system was asked"):
            question(str(tmp_path / "file"))


def other_names(recorded: ParentRef, *texts: str) -> ParentRef:
    """The same parent under these names."""
    names = [ParentName("relative path", text) for text in texts]
    names += [ParentName("absolute path", ""), ParentName("name", texts[0].split("\\")[-1], NameDialect.NAME)]
    return ParentRef(recorded.linkage_ids, recorded.timestamp, tuple(names))


def sector(text: str) -> bytes:
    """A sector that contains its description."""
    return text.encode().ljust(SECTOR_SIZE, b".")


# -- reading ------------------------------------------------------------------------------------------------------


WRITES = st.lists(st.tuples(st.integers(0, whole_sectors(SIZE) - 8), st.sampled_from([1, 3, 8])), max_size=5)


@pytest.mark.parametrize("kind", ["dynamic", "sparse"])
@given(layers=st.lists(WRITES, min_size=3, max_size=7), seed=st.integers(0, 1 << 32))
def test_chain_in_memory_reads_as_its_layers_were_written(
    kind: str, layers: list[list[tuple[int, int]]], seed: int
) -> None:
    """A chain of three or more layers, in separate folders, reads as written, without access to a real file."""
    rng, model, volume = random.Random(seed), bytearray(SIZE), MemoryVolume()
    places: list[str] = []
    with mock.patch.object(formats, "FORMATS", (SPARSE, *formats.FORMATS)):
        for number, runs in enumerate(layers):
            unit = 8 if kind == "sparse" else 1  # in sectors
            written = [(first // unit * unit, rng.randbytes(unit * count * SECTOR_SIZE)) for first, count in runs]
            written = [(first, data[: SIZE - first * SECTOR_SIZE]) for first, data in written]
            for first, data in written:
                model[first * SECTOR_SIZE : first * SECTOR_SIZE + len(data)] = data
            place = f"/srv/{'deep/' * rng.randrange(2)}{number}.vhd"
            image(volume, place, places[-1] if places else None, kind=kind, writes=written)
            places.append(place)
        options = OpenOptions(parent_dirs=["/srv"])
        with without_files(), Disk(Chain.open(places[-1], options=options, volume=volume)) as disk:
            assert disk.read(0, SIZE) == model
            assert [layer.store.name for layer in disk.chain.layers] == places[::-1]
            assert sum(extent.size_bytes for extent in disk.extents()) == SIZE
    assert volume.held == places[::-1]  # each is locked, by a reader
    assert not volume.open_files


def test_nothing_is_written_to_a_volume_that_can_only_be_read() -> None:
    """A writable open of an image outside the file system is refused, before anything is opened."""
    volume = MemoryVolume()
    image(volume, "/srv/disk.vhd")
    with without_files(), pytest.raises(errors.ReadOnly):
        open_layers("/srv/disk.vhd", writable=True, volume=volume)
    assert not volume.opened
    (layer,) = open_layers("/srv/disk.vhd", volume=volume)
    with pytest.raises(errors.ReadOnly):
        layer.store.pwrite(0, b"x")
    layer.close()


# -- the same as in a file system ------------------------------------------------------------------------------------


Scene = Callable[[MemoryVolume, str], tuple[str, OpenOptions]]


def base_and_child(volume: MemoryVolume, root: str, *names: str, base: str = "base.vhd") -> str:
    """A base, and a child in the folder `vm` with these names for it; returns the child's place."""
    image(volume, f"{root}/vm/{base}", writes=[(0, sector("base"))])
    recorded = reference(volume, f"{root}/vm/leaf.vhd", f"{root}/vm/{base}")
    image(volume, f"{root}/vm/leaf.vhd", other_names(recorded, *names) if names else recorded)
    return f"{root}/vm/leaf.vhd"


def beside(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent is beside its child."""
    return base_and_child(volume, root), OpenOptions()


def relative_leaf(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The leaf's name has superfluous parts."""
    base_and_child(volume, root)
    return f"{root}/vm/../vm/./leaf.vhd", OpenOptions()


def other_case(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent's name differs in case."""
    return base_and_child(volume, root, ".\\BASE.VHD"), OpenOptions()


def bare_name(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent's path does not exist; its bare name is found."""
    return base_and_child(volume, root, "C:\\Machines\\base.vhd"), OpenOptions()


def missing(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent is missing."""
    leaf = base_and_child(volume, root)
    del volume.files[f"{root}/vm/base.vhd"]
    return leaf, OpenOptions()


def long_name(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent's name is longer than a file name can be."""
    return base_and_child(volume, root, ".\\" + "x" * 300), OpenOptions()


def mismatched(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent was replaced by another disk."""
    leaf = base_and_child(volume, root)
    image(volume, f"{root}/vm/base.vhd")
    return leaf, OpenOptions()


def not_an_image(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent was overwritten."""
    leaf = base_and_child(volume, root)
    volume.add(f"{root}/vm/base.vhd").pwrite(0, b"text")
    return leaf, OpenOptions()


def folder_as_parent(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """A folder has the parent's name."""
    leaf = base_and_child(volume, root)
    volume.add(f"{root}/vm/base.vhd/file", volume.files.pop(f"{root}/vm/base.vhd"))
    return leaf, OpenOptions()


def loop(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent's parent is the leaf."""
    leaf, other = f"{root}/vm/leaf.vhd", f"{root}/vm/other.vhd"
    image(volume, leaf)
    image(volume, other, leaf)
    recorded = reference(volume, other, leaf)
    image(volume, leaf, reference(volume, leaf, other))
    layer = formats.probed(volume.files[leaf]).facts(volume.files[leaf])
    assert layer.linkage_id is not None
    formats.named("vhd").relink(volume.files[other], ParentRef((layer.linkage_id,), 0, recorded.names))
    return leaf, OpenOptions()


def too_deep(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """Six layers; the test allows five."""
    image(volume, f"{root}/0.vhd")
    for number in range(5):
        image(volume, f"{root}/{number + 1}.vhd", f"{root}/{number}.vhd")
    return f"{root}/5.vhd", OpenOptions()


def outside(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent is above its child's folder."""
    image(volume, f"{root}/base.vhd")
    image(volume, f"{root}/vm/leaf.vhd", f"{root}/base.vhd")
    return f"{root}/vm/leaf.vhd", OpenOptions()


def allowed(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The same, with the folder allowed."""
    return outside(volume, root)[0], OpenOptions(parent_dirs=[root])


def link_out(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """A link with the parent's name leads out of the folder."""
    leaf = base_and_child(volume, root)
    volume.add(f"{root}/secret/base.vhd", volume.files.pop(f"{root}/vm/base.vhd"))
    volume.links[f"{root}/vm/base.vhd"] = "../secret/base.vhd"
    return leaf, OpenOptions()


def link_within(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """A link to a folder in the folder is followed."""
    leaf = base_and_child(volume, root, ".\\link\\base.vhd")
    volume.add(f"{root}/vm/real/base.vhd", volume.files.pop(f"{root}/vm/base.vhd"))
    volume.links[f"{root}/vm/link"] = "real"
    return leaf, OpenOptions()


def linked_leaf(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The leaf is opened through a link in another folder."""
    leaf = base_and_child(volume, root)
    volume.links[f"{root}/links/disk.vhd"] = leaf.removeprefix(root).replace("/vm", "../vm", 1)
    return f"{root}/links/disk.vhd", OpenOptions()


def dangling(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """A link with the parent's name has no target."""
    leaf = base_and_child(volume, root)
    del volume.files[f"{root}/vm/base.vhd"]
    volume.links[f"{root}/vm/base.vhd"] = "gone.vhd"
    return leaf, OpenOptions()


def raw_parent(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The parent is a raw disk, which has no id."""
    volume.add(f"{root}/vm/base.img").pwrite(0, sector("raw") * whole_sectors(SIZE))
    image(volume, f"{root}/vm/leaf.vhd", f"{root}/vm/base.img")
    return f"{root}/vm/leaf.vhd", OpenOptions()


def allowed_raw_parent(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The same, with the caller's consent."""
    return raw_parent(volume, root)[0], OpenOptions(allow_raw_parent=True)


def undone(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """A change to the parent is unfinished: its undo log is beside it."""
    leaf = base_and_child(volume, root)
    store = volume.files[f"{root}/vm/base.vhd"]
    at = formats.named("vhd").open(store).block_offset(0)
    log = plan_change(store, pending.id_of(store), [(at, sector("half"))])
    volume.add(f"{root}/vm/.base.vhd.vhdkit-undo").pwrite(0, encode(log))
    apply_change(store, log)
    return leaf, OpenOptions()


def link_as_log(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The same, with a link to the log in its place, which is ignored."""
    leaf, options = undone(volume, root)
    volume.add(f"{root}/log", volume.files.pop(f"{root}/vm/.base.vhd.vhdkit-undo"))
    volume.links[f"{root}/vm/.base.vhd.vhdkit-undo"] = "../log"
    return leaf, options


def merging(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """A merge into the parent stopped during the copying: its record is beside the parent."""
    leaf = base_and_child(volume, root)
    base, elsewhere = (Named(one, pending.id_of(volume.files[one])) for one in (f"{root}/vm/base.vhd", leaf))
    elsewhere = replace(elsewhere, path=f"{root}/other/leaf.vhd")
    volume.add(record_of(base.path, volume)).pwrite(0, Intent(Phase.COPY, base, (elsewhere,), False).encode())
    return base.path, OpenOptions()


def no_leaf(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The leaf does not exist."""
    base_and_child(volume, root)
    return f"{root}/vm/other.vhd", OpenOptions()


def folder_as_leaf(volume: MemoryVolume, root: str) -> tuple[str, OpenOptions]:
    """The leaf's name belongs to a folder."""
    base_and_child(volume, root)
    return f"{root}/vm", OpenOptions()


EXPECTED: dict[Scene, type[errors.VhdkitError] | str] = {
    beside: "base",
    relative_leaf: "base",
    other_case: "base",
    bare_name: "base",
    missing: errors.ParentMissing,
    long_name: errors.ParentMissing,
    mismatched: errors.ParentMismatch,
    not_an_image: errors.ParentMissing,
    folder_as_parent: errors.ParentMissing,
    loop: errors.CorruptImage,
    too_deep: errors.CorruptImage,
    outside: errors.ParentRefused,
    allowed: "\0",
    link_out: errors.ParentRefused,
    link_within: "base",
    linked_leaf: "base",
    dangling: errors.ParentMissing,
    raw_parent: errors.ParentRefused,
    allowed_raw_parent: "raw",
    undone: "base",
    link_as_log: "half",
    merging: "base",
    no_leaf: errors.NotFound,
    folder_as_leaf: errors.InvalidArgument,
}


def opened(leaf: str, options: OpenOptions, volume: Volume) -> object:
    """The result of opening the chain, as a value that can be compared."""
    try:
        layers = open_layers(leaf, options=options, volume=volume)
    except errors.VhdkitError as error:
        reason = getattr(error, "reason", None)
        return type(error), str(error), error.hint, error.path, reason, error.structure
    with Disk(Chain(layers)) as disk:
        described = [(layer.store.name, layer.facts, layer.findings) for layer in layers]
        return disk.read(0, SECTOR_SIZE), disk.size_bytes, described


@pytest.mark.parametrize("scene", EXPECTED, ids=lambda scene: scene.__name__)
def test_chain_opens_or_fails_as_in_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: Scene
) -> None:
    """Content, findings and errors are exactly those of the same files in a file system."""
    monkeypatch.setattr(opening, "MAX_CHAIN_DEPTH", 5)
    volume, root = MemoryVolume(), os.path.realpath(tmp_path)
    leaf, options = scene(volume, root)
    with without_files():
        found = opened(leaf, options, volume)
    assert isinstance(found, tuple)
    expected = EXPECTED[scene]
    if isinstance(expected, str):
        assert found[0].startswith(expected.encode())
    else:
        assert found[0] is expected
    assert not volume.open_files
    volume.write_to(Path("/"))
    assert found == opened(leaf, options, LOCAL)


def examined(leaf: str, options: OpenOptions, volume: Volume) -> object:
    """What `check` and `describe_chain` report about the chain, apart from the space that its files take."""
    try:
        described = describe_chain_on(volume, leaf, options)
        images = [replace(layer.image, allocated_bytes=0) for layer in described.layers]
        layers = tuple(replace(layer, image=one) for layer, one in zip(described.layers, images, strict=True))
        return check_on(volume, leaf, options), replace(described, layers=layers)
    except errors.VhdkitError as error:
        return type(error), str(error), error.hint


@pytest.mark.parametrize("scene", EXPECTED, ids=lambda scene: scene.__name__)
def test_chain_is_checked_and_described_as_in_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: Scene
) -> None:
    """Findings and facts are those of the same files in a file system."""
    monkeypatch.setattr(check, "MAX_CHAIN_DEPTH", 5)
    monkeypatch.setattr(describe, "MAX_CHAIN_DEPTH", 5)
    volume, root = MemoryVolume(), os.path.realpath(tmp_path)
    leaf, options = scene(volume, root)
    with without_files():
        found = examined(leaf, options, volume)
    assert not volume.open_files
    volume.write_to(Path("/"))
    assert found == examined(leaf, options, LOCAL)


@pytest.mark.parametrize("scene", [outside, link_out], ids=lambda scene: scene.__name__)
def test_nothing_outside_the_allowed_folders_is_opened(scene: Scene) -> None:
    """INV-NAME-WITHIN: no file is opened for a name that leads out of the allowed folders."""
    volume = MemoryVolume()
    leaf, options = scene(volume, "/srv")
    with pytest.raises(errors.ParentRefused):
        open_layers(leaf, options=options, volume=volume)
    assert {os.path.dirname(place) for place in volume.opened} == {"/srv/vm"}


# -- the state after the lock -------------------------------------------------------------------------------------


def test_parent_that_becomes_another_disk_before_its_lock_is_refused() -> None:
    """INV-PARENT-ID: an id that was right before the lock was taken, and has changed by then, is not accepted."""
    volume = MemoryVolume()
    leaf, _ = beside(volume, "/srv")
    other = image(volume, "/srv/other.vhd")

    def rewritten(place: str) -> None:
        if place.endswith("base.vhd"):
            store = volume.files[place]
            store.truncate(0)
            store.pwrite(0, other.contents())

    original = volume.files["/srv/vm/base.vhd"].copy()
    volume.when_locked = rewritten
    with pytest.raises(errors.ParentMismatch):
        open_layers(leaf, volume=volume)
    volume.add("/srv/vm/base.vhd", original)
    assert [finding.code for finding in check_on(volume, leaf, OpenOptions())] == ["parent-mismatch"]
    assert not volume.open_files


@pytest.mark.parametrize("is_copy", [True, False])
def test_parent_that_is_replaced_before_its_lock_is_opened_again(is_copy: bool) -> None:
    """INV-NAME-HELD: the parent is the file that has the name once the lock is taken, or the open fails."""
    volume = MemoryVolume()
    leaf, _ = beside(volume, "/srv")
    other = volume.files["/srv/vm/base.vhd"].copy() if is_copy else image(volume, "/srv/other.vhd")
    volume.when_locked = lambda place: None if place == leaf else volume.files.update({place: other})
    if not is_copy:
        with pytest.raises(errors.ParentMismatch):
            open_layers(leaf, volume=volume)
    else:
        layers = open_layers(leaf, volume=volume)
        assert layers[1].store.identity == other.identity
        for layer in layers:
            layer.close()
    assert not volume.open_files


def test_locators_of_a_child_in_memory_are_compared_there() -> None:
    """Whether a child's names lead to its parent is decided on the volume that holds both."""
    volume = MemoryVolume()
    leaf, _ = beside(volume, "/srv")
    facts = formats.named("vhd").facts(volume.files[leaf])
    with without_files():
        assert leads_to(facts, "/srv/vm/base.vhd", ("/srv/vm",), volume)
        assert not leads_to(facts, "/srv/vm/leaf.vhd", ("/srv/vm",), volume)
    assert ntpath.basename(facts.parent.names[0].text if facts.parent else "") == "base.vhd"
