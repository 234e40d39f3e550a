# SPDX-License-Identifier: Apache-2.0
"""Marks of nights beside images: no verb, kill or power cut leaves one that says more than is true."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.harness.folder_power import Cut, FolderPower, files_of, fill, repeatable
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vhdkit.chain.verbs.test_merge import FAMILIES, Family
from vhdkit import errors, folder
from vhdkit.chain.records import references
from vhdkit.chain.records.references import MAX_MARKS, MAX_RECORD_BYTES, SavedNight
from vhdkit.chain.verbs.live import freezing
from vhdkit.chain.verbs.live_merge import live_merge
from vhdkit.chain.verbs.live_pull import live_pull
from vhdkit.store import FileStore
from vhdkit.units import MIB, SECTOR_SIZE

SIZE = 2 * MIB
NIGHT = SavedNight("repo", "machine", "disk", 17, "id17")


@dataclass(frozen=True)
class Line:
    """A chain of three whose middle layer was frozen by a backup, and is marked."""

    folder: Path
    family: Family

    @property
    def base(self) -> Path:
        """The lowest layer."""
        return self.folder / self.family.base

    @property
    def frozen(self) -> Path:
        """The marked layer."""
        return self.folder / self.family.child("frozen")

    @property
    def leaf(self) -> Path:
        """What was written since."""
        return self.folder / self.family.child("leaf")


@pytest.fixture(params=FAMILIES)
def line(request: pytest.FixtureRequest, tmp_path: Path) -> Line:
    """The chain in each format."""
    return made(tmp_path / "work", FAMILIES[request.param])


def made(folder: Path, family: Family) -> Line:
    """Make the chain."""
    folder.mkdir()
    line = Line(folder, family)
    vhdkit.create_image(line.base, SIZE, disk_format=family.kind, block_size_bytes=family.block_size_bytes)
    write(line.base, 0, b"base")
    vhdkit.create_child(line.frozen, line.base)
    write(line.frozen, 4 * SECTOR_SIZE, b"frozen")
    vhdkit.create_child(line.leaf, line.frozen)
    mark(line.frozen)
    write(line.leaf, 8 * SECTOR_SIZE, b"leaf")
    return line


def write(path: Path, offset: int, word: bytes) -> None:
    """Write eight sectors."""
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(offset, (word * SECTOR_SIZE)[: 8 * SECTOR_SIZE])


def content(path: Path) -> bytes:
    """What the image reads as."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, SIZE)


def mark(path: Path, night: SavedNight = NIGHT) -> None:
    """Mark an image."""
    with FileStore.open_held(path, writer=False) as store:
        assert references.mark(store, night) is not None


def marked(path: Path) -> list[int]:
    """The numbers of the nights whose marks are believed."""
    return [one.night.number for one in references.marks_at(str(path))]


def record_of(path: Path) -> Path:
    """The record beside an image."""
    return Path(references.record_path(str(path)))


def claims(folder: Path, expected: bytes) -> int:
    """Check what every record says, whatever the length and the time of the image: its mtime may be lost in a cut."""
    count = 0
    for record in folder.rglob(".*.vhdkit-nights"):
        image = record.with_name(record.name[1 : -len(".vhdkit-nights")])
        try:
            marks = json.loads(record.read_bytes())["marks"]
        except ValueError:  # half of a record says nothing: see `test_a_damaged_record_has_no_marks`
            continue
        if not image.exists():
            continue
        with FileStore.open(image) as store:
            found = references.state_of(store).image_id.hex()
        for one in marks:
            if one["id"] == found:
                assert content(image) == expected, f"{image} does not read as in night {one['night']}"
                count += 1
    return count


def test_a_mark_is_believed_only_in_its_state(line: Line) -> None:
    """A mark counts while the image has the recorded id, length and time, and again when it has them again."""
    assert marked(line.frozen) == [17]
    status = line.frozen.stat()
    os.utime(line.frozen, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert marked(line.frozen) == []
    os.utime(line.frozen, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert marked(line.frozen) == [17]
    with open(line.frozen, "ab") as file:
        file.write(bytes(SECTOR_SIZE))
    os.utime(line.frozen, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert marked(line.frozen) == []
    other = line.folder / "other"
    shutil.copy2(line.base, other)
    os.replace(other, line.frozen)
    os.truncate(line.frozen, status.st_size)
    os.utime(line.frozen, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert marked(line.frozen) == []


def test_each_repository_has_a_mark(line: Line) -> None:
    """A disk's mark replaces its earlier one, others stay; the record goes with the last."""
    other, next_one = (
        SavedNight("other", "machine", "disk", 3, "id3"),
        SavedNight("repo", "machine", "disk", 18, "id18"),
    )
    mark(line.frozen, other)
    mark(line.frozen, next_one)
    assert [one.night for one in references.marks_at(str(line.frozen))] == [other, next_one]
    with FileStore.open_held(line.frozen, writer=False) as store:
        references.unmark(store, "repo", "machine", "disk")
        assert marked(line.frozen) == [3]
        references.unmark(store, "other", "machine", "disk")
    assert not record_of(line.frozen).exists()


def test_there_is_a_limit(tmp_path: Path) -> None:
    """So many marks fit, and one more is refused."""
    line = made(tmp_path / "work", FAMILIES["vhd"])
    record, long = record_of(line.frozen), "x" * references.MAX_NAME_LENGTH
    document = json.loads(record.read_bytes())
    names = {"machine": long, "disk": long, "night": 2**63 - 1, "night_id": long}
    places = [f"{number:03}{long[3:]}" for number in range(MAX_MARKS - 2)]
    document["marks"] += [document["marks"][0] | names | {"repository": place} for place in places]
    record.write_text(json.dumps(document))
    mark(line.frozen, SavedNight(long, long, long, 2**63 - 1, long))
    assert len(marked(line.frozen)) == MAX_MARKS and record.stat().st_size <= MAX_RECORD_BYTES
    with pytest.raises(errors.NoSpace):
        mark(line.frozen, SavedNight("one more", "machine", "disk", 1, "id"))
    assert len(marked(line.frozen)) == MAX_MARKS


def damages(document: dict[str, Any]) -> Iterator[bytes]:
    """The record with each kind of damage."""
    yield from (b"", b"\xff{", b"[" * 50_000, b"7")
    yield json.dumps(document | {"format": "vhdkit nights record 2"}).encode()
    yield json.dumps(document | {"marks": 7}).encode()
    yield json.dumps(document | {"marks": document["marks"] * 2}).encode()
    yield json.dumps(document).encode().ljust(MAX_RECORD_BYTES + 1)
    values = (
        ("repository", ""), ("machine", "x" * 129), ("disk", 5), ("night_id", ""), ("night", -1), ("night", True),
        ("night", 2**63), ("size", "1"), ("mtime_ns", None), ("id", "12"),
    )  # fmt: skip
    for name, value in values:
        yield json.dumps(document | {"marks": [document["marks"][0] | {name: value}]}).encode()


def test_a_damaged_record_has_no_marks(tmp_path: Path) -> None:
    """Whatever a record contains, it is either right or says nothing, and it is in nothing's way."""
    line = made(tmp_path / "work", FAMILIES["vhd"])
    document = json.loads(record_of(line.frozen).read_bytes())
    for raw in damages(document):
        record_of(line.frozen).write_bytes(raw)
        assert marked(line.frozen) == [], raw
    mark(line.frozen)
    assert marked(line.frozen) == [17]


def test_what_is_no_file_has_no_marks(tmp_path: Path) -> None:
    """A link or a folder in the place of the record is not followed, and does not hinder a writer."""
    line = made(tmp_path / "work", FAMILIES["vhd"])
    record, kept = record_of(line.frozen), tmp_path / "kept"
    os.rename(record, kept)
    line.leaf.unlink()
    for number in range(2):
        if number:
            record.unlink()
            record.mkdir()
        else:
            record.symlink_to(kept)
        assert marked(line.frozen) == []
        write(line.frozen, 0, b"new")
        assert kept.read_bytes()


def rewrite(line: Line) -> None:
    """Write to the marked image itself."""
    line.leaf.unlink()
    write(line.frozen, 0, b"new")


def merge_into(line: Line) -> None:
    """Merge the leaf into the marked layer."""
    vhdkit.merge(line.leaf)


def resize(line: Line) -> None:
    """Give the marked image another size."""
    line.leaf.unlink()
    vhdkit.resize(line.frozen, 2 * SIZE)


def compact(line: Line) -> None:
    """Make the marked image's file smaller."""
    line.leaf.unlink()
    vhdkit.compact(line.frozen)


def repair(line: Line) -> None:
    """Repair the marked image."""
    vhdkit.repair(line.frozen)


def rebase(line: Line) -> None:
    """Give the marked image a copy of its parent."""
    other = line.folder / f"other{line.family.base}"
    shutil.copy(line.base, other)
    vhdkit.rebase(line.frozen, other)


def merge_live_into(line: Line) -> None:
    """A snapshot of the leaf while it is served, and a merge of what it froze into the marked layer."""
    with vhdkit.open_disk(line.leaf, writable=True) as disk:
        with freezing([(disk.chain, None)]) as prepared:
            [chain] = prepared.freeze()
            prepared.done()
        with live_merge(chain, 1, 2) as merging:
            merging.copy()
            chain, problem = merging.exchange()
            assert problem is None
            merging.done()
        for layer in chain.layers:
            layer.close()
        disk.chain = chain


def pull(line: Line) -> None:
    """Make the marked image independent."""
    vhdkit.pull(line.frozen, independent=True)


REMOVING = [rewrite, merge_into, resize, compact, repair, rebase, merge_live_into, pull]


@pytest.mark.parametrize("verb", REMOVING)
def test_whatever_opens_an_image_for_writing_removes_its_marks(verb: Callable[[Line], None], line: Line) -> None:
    """INV-MARK-TRUE: no verb that may change what an image reads as leaves a mark, even one of another state."""
    verb(line)
    assert not record_of(line.frozen).exists()


def test_nothing_is_written_to_an_image_whose_mark_cannot_be_removed(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image whose record neither can be emptied nor removed is not opened for writing."""
    line.leaf.unlink()
    before = line.frozen.read_bytes()

    def refused(*args: object, **options: object) -> None:
        raise errors.AccessDenied("cannot remove")

    monkeypatch.setattr(references, "remove_file", refused)
    monkeypatch.setattr(FileStore, "truncate", refused)
    with pytest.raises(errors.AccessDenied):
        write(line.frozen, 0, b"new")
    assert line.frozen.read_bytes() == before and record_of(line.frozen).exists()


def merge_away(line: Line) -> None:
    """The marked layer goes into the base."""
    vhdkit.merge(line.frozen, relink_children=True)


def merge_away_live(line: Line) -> None:
    """The same while the leaf is served."""
    with vhdkit.open_disk(line.leaf, writable=True) as disk, live_merge(disk.chain, 1, 2) as merging:
        merging.copy()
        disk.chain, problem = merging.exchange()
        assert problem is None
        merging.done()


def relocate(line: Line) -> None:
    """The chain goes to another folder of the file system."""
    place = line.folder / "new"
    place.mkdir(exist_ok=True)
    vhdkit.relocate(line.leaf if line.leaf.exists() else place / line.leaf.name, place)


def merge_below(line: Line) -> None:
    """The marked layer stays; it gets another parent."""
    middle = line.folder / line.family.child("middle")
    if not middle.exists() and vhdkit.chain_paths(line.frozen)[1:] == [str(line.base)]:
        vhdkit.create_child(middle, line.base)
        vhdkit.rebase(line.frozen, middle, unsafe_new_id=True)
        mark(line.frozen)
    vhdkit.merge(middle, relink_children=True)


def pull_live(line: Line) -> None:
    """The marked layer is made independent while the leaf is served."""
    if len(vhdkit.chain_paths(line.frozen)) == 1:
        return
    with vhdkit.open_disk(line.leaf, writable=True) as disk, live_pull(disk.chain, 1, 2, cuts=True) as pulling:
        pulling.copy()
        disk.chain, problem = pulling.exchange()
        assert problem is None


KEEPING: list[tuple[Callable[[Line], None], Callable[[Line], Path]]] = [
    (merge_away, lambda line: line.base),
    (merge_away_live, lambda line: line.base),
    (relocate, lambda line: line.folder / "new" / line.frozen.name),
    (merge_below, lambda line: line.frozen),
    (pull_live, lambda line: line.frozen),
]


@pytest.mark.parametrize(("verb", "place"), KEEPING)
def test_a_mark_goes_where_the_content_goes(
    verb: Callable[[Line], None], place: Callable[[Line], Path], line: Line
) -> None:
    """A merge, a move and a change of a parent's names keep the mark with what it is about."""
    expected, leaf = content(line.frozen), content(line.leaf)
    verb(line)
    assert marked(place(line)) == [17] and content(place(line)) == expected
    assert claims(line.folder, expected) == 1
    assert content(next(line.folder.rglob(line.leaf.name))) == leaf


CUT = [merge_into, merge_live_into, merge_away, merge_away_live, relocate, pull_live]
# Those that begin by removing the mark, so that there is none whenever something has changed.
BEGIN_WITH_REMOVAL = [merge_into]


@pytest.mark.parametrize("name", ["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("verb", CUT)
def test_no_cut_leaves_a_mark_that_is_wrong(verb: Callable[[Line], None], name: str, tmp_path: Path) -> None:
    """INV-MARK-TRUE: wherever the power is cut, what a record says about the image with that id is true, even if the
    file's time is not on the device."""
    with repeatable("made"):
        line = made(tmp_path / "work", FAMILIES[name])
    expected, found, count = content(line.frozen), tmp_path / "found", [0]

    def judge(cut: Cut) -> None:
        fill(found, cut.files, ("new",))
        count[0] += claims(found, expected)

    with repeatable("run"):
        FolderPower(line.folder, "run", judge=judge, every=daily_or_nightly(3, 1)).run(lambda: verb(line))
    assert (count[0] > 0) is (verb not in BEGIN_WITH_REMOVAL)


@pytest.mark.parametrize("name", ["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("verb", CUT)
def test_no_kill_leaves_a_mark_that_is_wrong(verb: Callable[[Line], None], name: str, tmp_path: Path) -> None:
    """The same for a process that is killed, and for the merge that is resumed afterwards."""
    line = made(tmp_path / "work", FAMILIES[name])
    start, expected, leaf = files_of(line.folder), content(line.frozen), content(line.leaf)
    count = 0
    for _ in killings(lambda: verb(line), step=daily_or_nightly(37, 1)):
        count += claims(line.folder, expected)
        for target in (line.base, line.frozen):
            if target.exists() and vhdkit.merge_under_way(target) is not None:
                vhdkit.resume_merge(target)
        count += claims(line.folder, expected)
        paths = list(line.folder.rglob(line.leaf.name)) or [line.frozen]
        assert content(paths[0]) == leaf
        fill(line.folder, start)
        mark(line.frozen)
    assert count > 0


def test_the_time_is_durable_before_the_mark(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's own time is on the device before a record contains it."""
    order: list[str] = []
    sync_times, write_whole = FileStore.sync_times, folder.write_whole

    def noting_sync(store: FileStore) -> None:
        order.append("time")
        sync_times(store)

    def noting_write(*args: Any, **options: Any) -> None:
        order.append("record")
        write_whole(*args, **options)

    monkeypatch.setattr(FileStore, "sync_times", noting_sync)
    monkeypatch.setattr(references, "write_whole", noting_write)
    mark(line.frozen)
    assert order == ["time", "record"]


def test_gc_knows_the_records(line: Line) -> None:
    """A marked image counts as any other, its record goes with it, and a record without its image is garbage."""
    merged = line.folder / line.family.child("unused")
    vhdkit.create_child(merged, line.base)
    mark(merged)
    gone = line.folder / line.family.child("gone")
    vhdkit.create_child(gone, line.base)
    mark(gone)
    gone.unlink()
    items = vhdkit.collect_garbage(line.folder, [line.leaf], delete=True)
    assert {os.path.basename(one.path) for one in items if one.removed} == {merged.name, record_of(gone).name}
    assert not record_of(merged).exists() and marked(line.frozen) == [17]
