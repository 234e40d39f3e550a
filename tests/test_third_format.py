# SPDX-License-Identifier: Apache-2.0
"""The contract of a format is complete: one that is only registered in `FORMATS` can do everything that a VHD can.

The format is made up (`tests.harness.sparse_format`): sectors of 4096 bytes, ids by its own rule. No line of the
packages knows it. It runs through the conformance suite, the model of a chain, the power cuts, and the verbs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

import vhdkit
from tests.conformance import BLOCK_SIZE, CHECKS, Subject
from tests.harness.folder_power import FolderPower, files_of, fill, repeatable
from tests.harness.killing import killings
from tests.harness.model import SectorModel
from tests.harness.power import PowerRun, Scene, faults_of, open_mem, scribble
from tests.harness.sparse_format import SPARSE, SparseLayer
from tests.harness.stores import MemStore
from tests.nbd_client import serving
from tests.support import daily_or_nightly
from tests.vhdkit.test_disk_machine import MAX_DEPTH, DiskMachine
from vhdkit import formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.live import freezing
from vhdkit.chain.verbs.live_merge import live_merge
from vhdkit.disk import Disk
from vhdkit.formats.format import CreateRequest
from vhdkit.formats.probe import open_layer
from vhdkit.image import ParentRef
from vhdkit.serve.opening import ExportRequest, OpenMode, open_exports
from vhdkit.store import FileStore, Store
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, whole_sectors

SIZE = 3 * BLOCK_SIZE + 5 * PAGE_SIZE
PARENT = ParentRef.of_paths(b"p" * 16, 0, relative=".\\base.sparse", absolute="\\srv\\base.sparse", name="base.sparse")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is registered in the list, and nowhere else."""
    monkeypatch.setattr(formats, "FORMATS", (SPARSE, *formats.FORMATS))


def base_in(store: Store, size_bytes: int) -> None:
    """Make an empty image in the store."""
    SPARSE.create(store, CreateRequest(size_bytes, "sparse"))


def child_in(store: Store, parent: ParentRef, size_bytes: int) -> None:
    """Make an empty child in the store."""
    SPARSE.create_child(store, size_bytes, parent, block_size_bytes=PAGE_SIZE)


def base(name: str, size_bytes: int = SIZE) -> MemStore:
    """An empty image."""
    store = MemStore(name)
    base_in(store, size_bytes)
    return store


def child(name: str, parent: ParentRef = PARENT, size_bytes: int = SIZE) -> MemStore:
    """An empty child."""
    store = MemStore(name)
    child_in(store, parent, size_bytes)
    return store


UNIT = whole_sectors(PAGE_SIZE)
SUBJECTS = (
    Subject("base", SparseLayer, lambda store: base_in(store, SIZE), SPARSE.open, UNIT, SIZE),
    Subject("child", SparseLayer, lambda store: child_in(store, PARENT, SIZE), SPARSE.open, UNIT, SIZE),
)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[Subject], None], subject: Subject) -> None:
    """The layer contract, one check for one kind of layer: see the docstring of the check."""
    check(subject)


# -- power cuts and the model -------------------------------------------------------------------------------------


def base_scene(seed: int) -> Scene:
    """An image with some content."""
    leaf, content = base("leaf.sparse"), bytearray(SIZE)
    with open_mem(leaf, writable=True) as disk:
        scribble(disk, content, random.Random(seed), 3)
    return Scene(leaf, [], bytes(content))


def child_scene(seed: int) -> Scene:
    """A child over an image with content."""
    below = base_scene(seed)
    parents, content = [open_layer(below.leaf.copy(frozen=True))], bytearray(below.content)
    leaf = child("leaf.asparse")
    with open_mem(leaf, parents, writable=True) as disk:
        scribble(disk, content, random.Random(seed + 1), 2)
    return Scene(leaf, parents, bytes(content))


@pytest.mark.parametrize("scene", [base_scene, child_scene], ids=["base", "child"])
def test_every_cut_leaves_flushed_or_newer(scene: Callable[[int], Scene]) -> None:
    """INV-FLUSHED-OR-NEWER: wherever the power is cut, each sector holds its flushed content or newer."""
    run = PowerRun(scene(1), 1, steps=daily_or_nightly(12, 22))
    run.run()
    assert run.operations > run.syncs > 1 and run.judged > run.cuts * run.operations


def test_a_wrong_order_of_writes_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: a table that is written before its data loses what was flushed."""
    monkeypatch.setattr(SparseLayer, "flush", lambda self: None)
    with pytest.raises(AssertionError):
        PowerRun(base_scene(1), 1, steps=22).run()


class SparseMachine(DiskMachine):
    """The chain's model test, over chains of the made-up format."""

    @initialize(fixed=st.booleans(), size=st.integers(1, 400), block_size=st.just(PAGE_SIZE))
    def create(self, fixed: bool, size: int, block_size: int) -> None:
        """A base of zeros."""
        store = base("layer0.sparse", size * PAGE_SIZE)
        self.model = SectorModel(bytes(size * PAGE_SIZE))
        self._open(store)

    @precondition(lambda self: len(self.parents) < MAX_DEPTH)
    @rule(block_size=st.just(PAGE_SIZE), growth=st.sampled_from([0, 0, 1, 80]))
    def snapshot(self, block_size: int, growth: int) -> None:
        """The leaf becomes a parent; a new child, perhaps larger, takes the writes."""
        self.opened.close()
        parent = self.store.copy(frozen=True)
        self.parents.insert(0, parent)
        linkage_id = SPARSE.linkage_id(parent)
        assert linkage_id is not None
        ref = ParentRef.of_paths(linkage_id, 0, relative=f".\\{parent.name}", absolute="\\nowhere", name=parent.name)
        size = self.model.size_bytes + growth * PAGE_SIZE
        self.model = SectorModel(bytes(self.model.current).ljust(size, b"\0"))
        self._open(child(f"layer{len(self.parents)}.asparse", ref, size))

    def teardown(self) -> None:
        """The image left behind is sound."""
        if self.disk is not None:
            self.read_everything()
            self.disk.close()
            assert not faults_of(self.store.copy())


@pytest.mark.searched
def test_a_chain_behaves_as_a_bytearray() -> None:
    """INV-FLUSHED-OR-NEWER, INV-LEAF-ONLY-WRITES: whatever is done to a chain, it reads as the model."""
    examples = daily_or_nightly(10, 25)
    run_state_machine_as_test(SparseMachine, settings=settings(max_examples=examples, stateful_step_count=25))


def test_a_part_of_a_large_sector_is_written_as_a_whole_one() -> None:
    """A write of 512 bytes, zeros and trims of less than a sector leave the rest of the 4096 bytes unchanged."""
    with open_mem(base("a.sparse"), writable=True) as disk:
        disk.write(0, b"a" * 2 * PAGE_SIZE)
        disk.write(512, b"b" * 512)
        disk.write_zeroes(1024, 512)
        disk.trim(2048, 512)
        assert not disk.try_write(512, memoryview(b"c" * 512)), "this requires a read first"
        expected = b"a" * 512 + b"b" * 512 + bytes(512) + b"a" * 512
        assert disk.read(0, 2048) == expected and disk.read(2048, 6144) == b"a" * 6144


# -- the verbs ----------------------------------------------------------------------------------------------------


def made(folder: Path) -> Path:
    """An image with a word in its first and in its last sector."""
    path = folder / "disk.sparse"
    vhdkit.create_image(path, 2 * MIB, disk_format="sparse")
    write(path, {0: b"base", 2 * MIB - 512: b"end"})
    return path


def write(path: Path, words: dict[int, bytes]) -> None:
    """Write to the disk."""
    with vhdkit.open_disk(path, writable=True) as disk:
        for offset, word in words.items():
            disk.write(offset, word)


def content(path: Path | str) -> bytes:
    """The whole content of the disk."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[list[Path]]:
    """Three layers, leaf first, each with its own word; the disk reads the same when the test ends."""
    path = made(tmp_path)
    (middle,) = [Path(vhdkit.snapshot(path))]
    write(middle, {MIB: b"middle", 100: b"over"})
    leaf = Path(vhdkit.snapshot(middle))
    write(leaf, {MIB + 3: b"leaf"})
    before = content(leaf)
    yield [leaf, middle, path]
    found = next(one for one in (leaf, middle, path) if one.exists())
    assert content(found) == before and before[:4] == b"base" and before[MIB : MIB + 7] == b"midleaf"


def test_children_are_named_and_linked_by_their_format(chain: list[Path]) -> None:
    """A snapshot has the same format, with its suffix, and records the linkage id, not the file id."""
    leaf, middle, path = chain
    assert [one.name for one in (leaf, middle)] == ["disk-1.asparse", "disk.asparse"]
    with vhdkit.open_disk(leaf) as disk:
        facts = [layer.facts for layer in disk.chain.layers]
    assert {one.format_name for one in facts} == {"sparse"} and len(facts) == 3
    assert facts[0].parent is not None and facts[0].parent.linkage_ids == (facts[1].linkage_id,)
    assert facts[1].linkage_id != facts[1].file_id
    assert vhdkit.chain_paths(leaf) == [str(leaf), str(middle), str(path)]
    with pytest.raises(vhdkit.HasChildren):
        vhdkit.open_disk(path, writable=True)


def test_check_and_info(chain: list[Path]) -> None:
    """`check` examines each layer with its format, and the links; `describe_chain` says what each layer owns."""
    from vhdkit.chain.verbs.describe import describe_chain

    leaf, middle, _ = chain
    assert vhdkit.check(leaf) == []
    described = describe_chain(leaf)
    assert described.problem is None and [one.image.title for one in described.layers][-1] == "sparse"
    assert [one.owned_bytes for one in described.layers] == [PAGE_SIZE, PAGE_SIZE, PAGE_SIZE]
    raw = bytearray(middle.read_bytes())
    broken = leaf.with_name("broken.asparse")
    raw[2 * PAGE_SIZE + 4 : 2 * PAGE_SIZE + 8] = raw[2 * PAGE_SIZE : 2 * PAGE_SIZE + 4] = b"\0\0\0\3"
    broken.write_bytes(raw)
    assert "table" in [one.code for one in vhdkit.check(broken)]
    broken.unlink()


@pytest.mark.parametrize("into", [1, 2])
def test_merge(chain: list[Path], into: int) -> None:
    """Layers are merged into one below them; removed files are identified by their file ids."""
    leaf = chain[0]
    merged = vhdkit.merge(leaf, into=chain[into])
    assert merged.removed == tuple(str(one) for one in chain[:into])
    assert not leaf.exists() and vhdkit.check(chain[into]) == []


def test_merge_to_a_new_file(chain: list[Path], tmp_path: Path) -> None:
    """The result has the same format, and its parent is that of the merged layers."""
    leaf, middle, path = chain
    vhdkit.merge(leaf, into=middle, to=tmp_path / "new.asparse")
    assert vhdkit.chain_paths(tmp_path / "new.asparse") == [str(tmp_path / "new.asparse"), str(path)]
    assert content(tmp_path / "new.asparse") == content(leaf)


def test_an_interrupted_merge_is_resumed(chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-RECORD-PROVEN: the record names files by their file ids; the merge is finished from it."""
    from vhdkit.chain.verbs import merge_steps

    leaf, middle, _ = chain
    with monkeypatch.context() as patch:
        patch.setattr(merge_steps.RealNames, "remove", lambda self, path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            vhdkit.merge(leaf, into=middle)
    assert vhdkit.merge_under_way(leaf) == str(middle)
    leaf.unlink()  # as if the machine had stopped after the first name
    assert vhdkit.resume_merge(middle).target == str(middle)
    assert vhdkit.merge_under_way(middle) is None


def test_rebase(chain: list[Path], tmp_path: Path) -> None:
    """A parent that was moved is found again by its id; one with another id is refused."""
    leaf, middle, path = chain
    moved = tmp_path / "other name.sparse"
    path.rename(moved)
    with pytest.raises(vhdkit.ParentMissing):
        content(middle)
    vhdkit.rebase(middle, moved)
    other = tmp_path / "other.sparse"
    vhdkit.create_image(other, 2 * MIB, disk_format="sparse")
    with pytest.raises(vhdkit.ParentMismatch):
        vhdkit.rebase(middle, other)
    vhdkit.check(leaf)


def test_convert(chain: list[Path], tmp_path: Path) -> None:
    """From a chain of the format to a VHD and a raw disk, and back from both."""
    leaf, expected = chain[0], content(chain[0])
    for kind, name in (("dynamic", "a.vhd"), ("raw", "a.img"), ("fixed", "b.vhd")):
        vhdkit.convert(leaf, tmp_path / name, kind, accept_sector_size=True)
        vhdkit.convert(tmp_path / name, tmp_path / f"{name}.sparse", "sparse")
        assert content(tmp_path / f"{name}.sparse") == expected
    assert vhdkit.compare(tmp_path / "a.vhd", leaf).same_content


@pytest.mark.parametrize("seed", range(3))
def test_convert_from_smaller_sectors(tmp_path: Path, seed: int) -> None:
    """Data that begins and ends within the format's sectors, in single sectors of 512 bytes, is converted to it."""
    source, made, rng = [tmp_path / "base.vhd", tmp_path / "leaf.avhd"], tmp_path / "made.sparse", random.Random(seed)
    vhdkit.create_image(source[0], SIZE, block_size_bytes=BLOCK_SIZE)
    for path in source:
        if path != source[0]:
            vhdkit.create_child(path, source[0])
        with vhdkit.open_disk(path, writable=True) as disk:
            for _ in range(12):
                count = rng.choice((1, 3, 9, 300))
                place = rng.randrange(whole_sectors(SIZE) - count) * SECTOR_SIZE
                disk.write(place, rng.randbytes(count * SECTOR_SIZE))
    vhdkit.convert(source[1], made, "sparse")
    assert content(made) == content(source[1])


def test_unsupported_operations_are_refused(chain: list[Path]) -> None:
    """A format without `Resizable` and `Compactable` leads to an error, and nothing happens."""
    with pytest.raises(vhdkit.InvalidArgument, match="size cannot be changed"):
        vhdkit.resize(chain[0], 4 * MIB)
    with pytest.raises(vhdkit.InvalidArgument, match="cannot be made smaller"):
        vhdkit.compact(chain[0])


def test_relocate_and_garbage(chain: list[Path], tmp_path: Path) -> None:
    """A chain moves with its names, and unreferenced layers are found."""
    place = tmp_path / "place"
    place.mkdir()
    expected = content(chain[0])
    moves = vhdkit.relocate(chain[0], place)
    assert content(moves[0].new_path) == expected
    clone = place / "clone.asparse"
    vhdkit.clone(moves[0].new_path, [clone])
    (item,) = vhdkit.collect_garbage(place, [moves[0].new_path], delete=True)
    assert item.removed and item.path == str(clone)
    vhdkit.relocate(moves[0].new_path, tmp_path)


def test_snapshot_and_merge_while_the_disk_is_open(chain: list[Path], tmp_path: Path) -> None:
    """An open chain grows, and its layers are merged, as by a server."""
    leaf, expected = chain[0], content(chain[0])
    disk = vhdkit.open_disk(leaf, writable=True)
    with freezing([(disk.chain, None)]) as prepared:
        (grown,) = prepared.freeze()
        prepared.done()
    disk = Disk(grown)
    disk.write(MIB + 7, b"!")
    with live_merge(disk.chain, 1, 2) as merging:
        merging.copy()
        shorter, problem = merging.exchange()
        assert problem is None
        merging.done()
    disk = Disk(shorter)
    assert len(shorter.layers) == 3 and disk.read(0, MIB) == expected[:MIB]
    disk.close()
    newest = leaf.with_name("disk-2.asparse")
    assert content(newest)[MIB : MIB + 8] == b"midleaf!"
    write(newest, {MIB + 7: b"\0"})


# -- an id that changes with the first write of a session -------------------------------------------------------


def ids_of(path: Path) -> tuple[bytes | None, bytes | None, tuple[bytes, ...]]:
    """(file id, linkage id, ids recorded for the parent) of an image."""
    with FileStore.open(path) as store:
        facts = SPARSE.facts(store)
    return facts.file_id, facts.linkage_id, facts.parent.linkage_ids if facts.parent is not None else ()


def test_the_linkage_id_changes_once_in_a_session(tmp_path: Path) -> None:
    """Reading does not change it, the first write does, later writes do not; the file id stays."""
    path = made(tmp_path)
    first = ids_of(path)
    content(path)
    vhdkit.open_disk(path, writable=True).close()
    assert ids_of(path) == first
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, b"a" * PAGE_SIZE)
        second = ids_of(path)
        disk.write(0, b"b" * PAGE_SIZE)
        disk.write(MIB, b"b" * PAGE_SIZE)
    assert ids_of(path) == second and second[0] == first[0] and second[1] != first[1]


def test_a_merge_renews_the_id_of_its_target(chain: list[Path]) -> None:
    """The target gets another id, which its children record after the merge; the base is not written to."""
    leaf, middle, path = chain
    others = [leaf.with_name(f"{name}.asparse") for name in ("one", "two")]
    vhdkit.clone(leaf, others)
    expected, before, base = content(leaf), ids_of(middle), ids_of(path)
    vhdkit.merge(leaf, relink_children=True)
    assert ids_of(middle)[0] == before[0] and ids_of(middle)[1] != before[1] and ids_of(path) == base
    for other in others:
        assert ids_of(other)[2] == (ids_of(middle)[1],) and content(other) == expected
        assert vhdkit.check(other) == []
        other.unlink()


def _links_hold(leaf: Path, target: Path, expected: bytes) -> None:
    """The leaf, or if it is gone the merge's target, and each child of it read as before."""
    for path in (leaf if leaf.exists() else target, *leaf.parent.glob("child*")):
        assert content(path) == expected, path


@pytest.mark.parametrize("into", [1, 2])
@pytest.mark.parametrize("relink", [False, True])
def test_every_cut_of_a_merge_leaves_valid_links(tmp_path: Path, into: int, relink: bool) -> None:
    """INV-MERGE-PRESERVES: wherever the power is cut in a merge whose target gets another id, every image finds its
    parent and reads as before; the merge is then resumed, cut again, and resumed to its end."""
    folder, names = tmp_path / "work", ["leaf.asparse", "middle.asparse", "disk.sparse"]
    leaf, target = folder / names[0], folder / names[into]
    folder.mkdir()
    with repeatable("made"):
        write_chain(folder, names, relink=relink)
        start = files_of(folder)
    expected = content(leaf)

    def merged() -> None:
        vhdkit.merge(leaf, into=target, relink_children=relink)

    def resumed() -> None:
        if vhdkit.merge_under_way(target) is not None:
            vhdkit.resume_merge(target)

    first = FolderPower(folder, f"merge {into}")
    with repeatable("merge"):
        first.run(merged)
    assert first.cuts and not leaf.exists()
    assert files_of(folder).keys() == {*names[into:], *(name for name in start if name.startswith("child"))}
    for number, cut in enumerate(first.cuts):
        fill(folder, cut.files)
        _links_hold(leaf, target, expected)
        if number % daily_or_nightly(3, 1):  # the second cut is tried after a part of the first ones
            resumed()
            _links_hold(leaf, target, expected)
            continue
        again = FolderPower(folder, f"resume {number}")
        with repeatable(f"resume {number}"):
            again.run(resumed)
        _links_hold(leaf, target, expected)
        for found in random.Random(number).sample(again.cuts, min(2, len(again.cuts))):
            fill(folder, found.files)
            _links_hold(leaf, target, expected)
            resumed()
            _links_hold(leaf, target, expected)
            assert leaf.exists() or vhdkit.merge_under_way(target) is None


def write_chain(folder: Path, names: list[str], *, relink: bool) -> None:
    """Make a chain of these names, leaf first, each with its own words; with `relink` the leaf has two children."""
    size = 16 * PAGE_SIZE
    vhdkit.create_image(folder / names[-1], size, disk_format="sparse")
    for number in reversed(range(len(names))):
        if number < len(names) - 1:
            vhdkit.create_child(folder / names[number], folder / names[number + 1])
        words = {number * PAGE_SIZE: b"word", (number + 5) * PAGE_SIZE + 77: bytes([number + 1]) * PAGE_SIZE}
        write(folder / names[number], words)
    if relink:
        for number in range(2):
            vhdkit.create_child(folder / f"child{number}.asparse", folder / names[0])


@pytest.mark.parametrize("verb", ["merge_in_place", "live_merge"])
def test_a_merge_that_does_not_announce_the_id_is_detected(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Self-test: if the layer above did not record the new id first, the tests of cuts and kills would fail."""
    monkeypatch.setattr(f"vhdkit.chain.verbs.{verb}.accept_renewed_id", lambda child, target, named: None)
    with pytest.raises(vhdkit.ParentError):
        if verb == "live_merge":
            test_every_kill_of_a_live_merge_leaves_valid_links(tmp_path, 1)
        else:
            test_every_cut_of_a_merge_leaves_valid_links(tmp_path, 1, False)


def test_a_link_with_the_id_from_before_the_merge_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: children that record the target's id from before it was filled do not find it."""
    monkeypatch.setattr("vhdkit.chain.verbs.merge_in_place._target_now", lambda plan: plan.target.facts)
    with pytest.raises(vhdkit.ParentError):
        test_every_cut_of_a_merge_leaves_valid_links(tmp_path, 1, True)


@pytest.mark.parametrize("written", ["never", "before", "prepared"])
def test_a_leaf_that_is_frozen_while_it_is_written_to(tmp_path: Path, written: str) -> None:
    """Its child finds it whether the id changed before the child was made, afterwards, or not at all; and a child in
    another folder leaves a mark that protects it."""
    path, place = made(tmp_path), tmp_path / "place"
    place.mkdir()
    before = ids_of(path)
    disk = vhdkit.open_disk(path, writable=True)
    if written == "before":
        disk.write(0, b"new")
    with freezing([(disk.chain, str(place / "child.asparse"))]) as prepared:
        if written == "prepared":
            disk.write(0, b"new")
        (grown,) = prepared.freeze()
        prepared.done()
    Disk(grown).close()
    assert (ids_of(path)[1] == before[1]) == (written == "never")
    assert ids_of(path)[1] in ids_of(place / "child.asparse")[2]
    options = vhdkit.OpenOptions(parent_dirs=(str(tmp_path),))
    with vhdkit.open_disk(place / "child.asparse", options=options) as opened:
        assert opened.read(0, 4) == (b"base" if written == "never" else b"newe")
    assert [one.code for one in vhdkit.check(place / "child.asparse", options=options)] == []
    with pytest.raises(vhdkit.HasChildren):
        vhdkit.open_disk(path, writable=True)


@pytest.mark.parametrize("first", [0, 1])
def test_every_kill_of_a_live_merge_leaves_valid_links(tmp_path: Path, first: int) -> None:
    """INV-MERGE-PRESERVES: a server that dies anywhere in a live merge leaves a chain in which every image finds its
    parent; what the leaf had flushed is there, and the merge is resumed."""
    folder, names = tmp_path / "work", ["leaf.asparse", "middle.asparse", "disk.sparse"]
    leaf, target = folder / names[0], folder / names[first + 1]
    folder.mkdir()
    write_chain(folder, names, relink=False)
    start, expected = files_of(folder), content(leaf)

    def work() -> None:
        chain = Chain.open(leaf, writable=True)
        with live_merge(chain, first, first + 1) as merging:
            merging.copy()
            chain, problem = merging.exchange()
            assert problem is None
            merging.done()
        chain.close()

    count = 0
    for _ in killings(work):
        count += 1
        _links_hold(leaf, target, expected)
        if vhdkit.merge_under_way(target) is not None:
            vhdkit.resume_merge(target)
            _links_hold(leaf, target, expected)
        fill(folder, start)
    assert count > 10


def test_after_a_stopped_live_merge_the_leaf_can_be_written_to(tmp_path: Path) -> None:
    """The leaf records both ids of its parent while it is open; afterwards it can be written to as before."""
    names = ["leaf.asparse", "middle.asparse", "disk.sparse"]
    write_chain(tmp_path, names, relink=False)
    disk = vhdkit.open_disk(tmp_path / names[0], writable=True)
    disk.write(9 * PAGE_SIZE, b"!")

    def stop(done: int, total: int) -> None:
        raise vhdkit.Cancelled("enough")

    with pytest.raises(vhdkit.Cancelled), live_merge(disk.chain, 0, 1) as merging:
        merging.copy(stop)
    disk.write(9 * PAGE_SIZE, b"?!")
    expected = disk.read(0, disk.size_bytes)
    disk.close()
    assert content(tmp_path / names[0]) == expected
    vhdkit.merge(tmp_path / names[0])
    assert content(tmp_path / names[1]) == expected


def test_serve(chain: list[Path]) -> None:
    """A client reads and writes the disk; the export is described correctly."""
    (export,) = open_exports([ExportRequest(str(chain[0]), "disk")], OpenMode(vhdkit.OpenOptions()))
    assert export.description.startswith("sparse child, 2.0 MiB, disk-1.asparse, chain of 3")
    with serving(export) as running, running.client("disk") as client:
        assert client.read(0, 4) == b"base" and client.read(MIB, 7) == b"midleaf"
        assert not client.call(1, 600, 3, payload=b"new").error
        assert client.read(598, 7) == b"\0\0new\0\0"
        assert not client.call(1, 600, 3, payload=bytes(3)).error
