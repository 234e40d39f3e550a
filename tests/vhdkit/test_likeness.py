# SPDX-License-Identifier: Apache-2.0
"""Who may read what vhdkit makes: only users who could read its sources."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhd_builder import KIB, MIB, Block, Vhd, pattern
from vhdkit.chain.verbs.live import freezing
from vhdkit.chain.verbs.stream import import_stream
from vhdkit.folder import NewFile, write_whole

UMASKS = (0, 0o022, 0o777)
MODES = (0o600, 0o640, 0o644, 0o666, 0o604, 0o400, 0o444)


@pytest.fixture(params=UMASKS, ids=oct, autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test under a permissive umask, the usual one, and one that removes all permissions."""
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    """The permission bits of its mode."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder in which work is possible whatever the umask is."""
    path = tmp_path / "room"
    path.mkdir()
    path.chmod(0o700)
    return path


@pytest.fixture
def parent(room: Path) -> Path:
    """An image with some content."""
    path = room / "base.vhd"
    vhdkit.create_image(path, 4 * MIB, block_size_bytes=512 * KIB)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, b"secret" * 100)
    return path


def child_like(mode: int) -> int:
    """The mode of a file that is made from one with this mode: its owner may write to it."""
    return mode & 0o666 | 0o600


@pytest.mark.parametrize("disk_format", vhdkit.DiskFormat)
def test_new_images_are_private(room: Path, disk_format: vhdkit.DiskFormat) -> None:
    """INV-NEW-PRIVATE: 0600 for every format; a replaced file keeps its mode."""
    path = room / "new.img"
    vhdkit.create_image(path, MIB, disk_format=disk_format)
    assert mode_of(path) == 0o600
    path.chmod(0o664)
    vhdkit.create_image(path, MIB, disk_format=disk_format, replace=True)
    assert mode_of(path) == 0o664


@pytest.mark.parametrize("mode", MODES, ids=oct)
def test_children_have_their_parents_permissions(room: Path, parent: Path, mode: int) -> None:
    """INV-NEW-PRIVATE: snapshot, clone, create --parent, a kept overlay, and a leaf frozen while it is open."""
    parent.chmod(mode)
    made: dict[str, Callable[[Path], object]] = {
        "clone": lambda path: vhdkit.clone(parent, [path]),
        "child": lambda path: vhdkit.create_child(path, parent),
        "snapshot": lambda path: vhdkit.snapshot(parent, path),
        "live": lambda path: _frozen(parent, path),
    }
    for name, make in made.items():
        path = room / f"{name}.avhd"
        make(path)
        assert mode_of(path) == child_like(mode), name
        path.unlink()


def _frozen(leaf: Path, path: Path) -> None:
    leaf_mode = mode_of(leaf)
    leaf.chmod(0o600)  # to open it at all, where the tests are not run by root
    with vhdkit.open_disk(leaf, writable=True) as disk:
        leaf.chmod(leaf_mode)
        with freezing([(disk.chain, str(path))]) as prepared:
            prepared.done()
            for child in prepared.children:
                child.close()


@pytest.mark.parametrize("mode", MODES, ids=oct)
def test_copies_are_no_more_readable_than_all_their_sources(room: Path, parent: Path, mode: int) -> None:
    """INV-NEW-PRIVATE: convert and merge --to of a chain whose layers have different modes; a target keeps its own."""
    leaf = room / "leaf.avhd"
    vhdkit.create_child(leaf, parent)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(MIB, b"more" * 100)
    for first, second in ((leaf, parent), (parent, leaf)):
        first.chmod(0o666)
        second.chmod(mode)
        vhdkit.convert(leaf, room / "copy.raw", disk_format=vhdkit.DiskFormat.RAW)
        assert mode_of(room / "copy.raw") == child_like(mode)
        (room / "copy.raw").chmod(0o644)
        vhdkit.convert(leaf, room / "copy.raw", disk_format=vhdkit.DiskFormat.RAW, replace=True)
        assert mode_of(room / "copy.raw") == 0o644
        (room / "copy.raw").unlink()
    leaf.chmod(mode)
    vhdkit.merge(leaf, to=room / "merged.avhd")
    assert mode_of(room / "merged.avhd") == child_like(mode)


@pytest.mark.parametrize("mode", MODES, ids=oct)
def test_files_beside_an_image_have_its_permissions(room: Path, mode: int) -> None:
    """INV-NEW-PRIVATE: a repair's backup and report, and the image after repair, resize, compact, relocate."""
    image = Vhd(size=4 * MIB, block_size=512 * KIB, blocks={0: Block(pattern(512 * KIB))}, tail=b"", entries={3: 2})
    path = image.build().write(room / "a.vhd")
    path.chmod(mode | 0o200)
    done = vhdkit.repair(path, accept_data_loss=True, undo=room / "a.undo")
    assert done.report_path is not None
    for one in (room / "a.undo", Path(done.report_path)):
        assert mode_of(one) == child_like(mode)
    vhdkit.resize(path, 8 * MIB)
    vhdkit.compact(path)
    assert mode_of(path) == mode | 0o200
    (room / "there").mkdir()
    (room / "there").chmod(0o700)
    vhdkit.relocate(path, room / "there")
    assert mode_of(room / "there" / "a.vhd") == child_like(mode)


def test_streams_and_records(room: Path) -> None:
    """INV-NEW-PRIVATE: images from a pipe, and whole records, are private to their owner; a pid file is not."""
    data = [bytes(MIB)]
    import_stream(lambda size: data.pop() if data else b"", room / "in.vhd", vhdkit.DiskFormat.FIXED)
    write_whole(str(room / "note"), b"x")
    assert mode_of(room / "in.vhd") == mode_of(room / "note") == 0o600
    write_whole(str(room / "pid"), b"1", mode=0o644)
    assert mode_of(room / "pid") == 0o644
    (room / "note").chmod(0o640)
    write_whole(str(room / "note"), b"y")
    assert mode_of(room / "note") == 0o640


def test_a_file_is_private_from_its_first_moment(room: Path, parent: Path) -> None:
    """INV-NEW-PRIVATE: also under its temporary name."""
    with NewFile(room / "new.vhd"):
        (part,) = [one for one in room.iterdir() if one.name.endswith(".part")]
        assert mode_of(part) & 0o077 == 0


def test_owners_and_groups(room: Path, parent: Path) -> None:
    """INV-NEW-PRIVATE: children that root makes belong to the parent's owner; a copy of files of several owners
    belongs to root, and a group that cannot read one of them cannot read the copy."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.chown(parent, 65534, 65533)
    parent.chmod(0o640)
    vhdkit.create_child(room / "leaf.avhd", parent)
    status = (room / "leaf.avhd").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (65534, 65533, 0o640)
    os.chown(room / "leaf.avhd", 65532, 65531)
    for mode, wanted in ((0o640, 0o600), (0o664, 0o600), (0o644, 0o600)):
        (room / "leaf.avhd").chmod(mode)
        vhdkit.convert(room / "leaf.avhd", room / "copy.raw", disk_format=vhdkit.DiskFormat.RAW)
        status = (room / "copy.raw").stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, os.getegid(), wanted)
        (room / "copy.raw").unlink()


def test_merge_records_have_the_targets_permissions(room: Path, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NEW-PRIVATE: exactly the users who may read the target may read its record."""
    leaf = room / "leaf.avhd"
    vhdkit.create_child(leaf, parent)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(MIB, b"more" * 100)
    parent.chmod(0o640)
    seen: list[int] = []
    monkeypatch.setattr("vhdkit.chain.verbs.merge_steps.RealNames.remove", _looking(seen, room))
    vhdkit.merge(leaf)
    assert seen and set(seen) == {0o640}


def _looking(seen: list[int], room: Path) -> Callable[[object, str], None]:
    def remove(self: object, path: str) -> None:
        seen.extend(mode_of(one) for one in room.iterdir() if one.name.endswith("vhdkit-merge"))
        os.unlink(path)

    return remove
