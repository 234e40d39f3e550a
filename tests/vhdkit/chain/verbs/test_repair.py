# SPDX-License-Identifier: Apache-2.0
"""Repairs of real files: complete or not at all, undone byte for byte, and the parent's names."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings
from tests.harness.vhd_builder import FIXED, KIB, MIB, Block, Vhd, child, pattern, put
from tests.support import sample
from vhdkit import OpenOptions, Severity, errors
from vhdkit.chain.records import pending
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.repair import LOSS
from vhdkit.formats.vhd.repair_footers import DEAD
from vhdkit.image import ExtentKind
from vhdkit.store import FileStore

BLOCK = 512 * KIB


def damaged(path: Path, **fields: object) -> Path:
    """A dynamic image without a trailing footer, with a wrong geometry and whatever else the fields say."""
    values: dict[str, object] = {
        "size": 8 * MIB,
        "block_size": BLOCK,
        "blocks": {0: Block(pattern(BLOCK)), 5: Block(pattern(4096, 2))},
        "chs": (1, 1, 1),
        "tail": b"",
    }
    Vhd(**(values | fields)).build().write(path)  # type: ignore[arg-type]
    return path


def problems(path: Path, options: OpenOptions | None = None) -> list[str]:
    """The codes of findings worse than notes."""
    return [one.code for one in vhdkit.check(path, options=options) if one.severity > Severity.NOTE]


def test_a_repair_can_be_undone(tmp_path: Path) -> None:
    """A repaired image is clean; its backup restores every byte and the size; the names of both are reported."""
    image, undo = damaged(tmp_path / "a.vhd"), tmp_path / "a.undo"
    before = image.read_bytes()
    assert problems(image)
    planned = vhdkit.repair(image, dry_run=True)
    assert image.read_bytes() == before and [one for one in planned.findings if one.severity > Severity.NOTE] == []
    done = vhdkit.repair(image, undo=undo)
    assert [fix.code for fix in done.fixes] == ["footer", "geometry"] == [fix.code for fix in planned.fixes]
    assert done.undo_path == str(undo) and done.report_path is None and done.changed_bytes > 0
    assert problems(image) == [] and sorted(os.listdir(tmp_path)) == ["a.undo", "a.vhd"]
    after = image.read_bytes()
    assert vhdkit.restore(image, undo) == done.changed_bytes
    assert image.read_bytes() == before
    assert vhdkit.repair(image).changed_bytes and image.read_bytes() == after
    assert vhdkit.repair(image).fixes == ()


def test_data_is_dropped_only_with_consent_and_reported(tmp_path: Path) -> None:
    """Without consent no data is dropped; with it a report lists the ranges, beside the image or where requested."""
    image = damaged(tmp_path / "a.vhd", entries={5: 2, 9: 0x7FFFFFFF})
    done = vhdkit.repair(image)
    assert [fix.needs for fix in done.fixes if fix.code == "bat"] == [LOSS] and done.report_path is None
    assert "block-over-metadata" in problems(image)
    (tmp_path / "a.vhd.lost.json").write_text("older")
    done = vhdkit.repair(image, accept_data_loss=True)
    assert done.report_path == str(tmp_path / "a.vhd.lost-2.json")
    report = json.loads(Path(done.report_path).read_text())
    assert report["lost"] == [{"offset_bytes": block * BLOCK, "size_bytes": BLOCK} for block in (5, 9)]
    with vhdkit.open_disk(image) as disk:
        assert disk.read(0, BLOCK) == pattern(BLOCK) and disk.read(5 * BLOCK, BLOCK) == bytes(BLOCK)


def test_overlapping_blocks_are_read_and_moved_apart(tmp_path: Path) -> None:
    """INV-BLOCKS-DISJOINT, INV-UNTANGLED: such an image is read and converted, but not written to, merged into or
    resized until a repair has moved its blocks apart; then it reads the same, and what is doubtful is reported."""
    image = Vhd(size=4 * BLOCK, block_size=BLOCK, chs=(60, 4, 17), blocks={0: Block(pattern(BLOCK))})
    start = image.build().starts[0]
    image.blocks[1] = Block(pattern(BLOCK, 2), start=start + BLOCK)
    image.build().write(tmp_path / "base.vhd")
    vhdkit.create_child(tmp_path / "leaf.avhd", tmp_path / "base.vhd")
    path = tmp_path / "base.vhd"

    def content(one: Path) -> bytes:
        with vhdkit.open_disk(one) as disk:
            return disk.read(0, disk.size_bytes)

    shown = content(path)
    meant = put(pattern(BLOCK), BLOCK - 512, b"\xff" * 512) + pattern(BLOCK, 2)
    assert shown == content(tmp_path / "leaf.avhd") == meant + bytes(2 * BLOCK)
    vhdkit.convert(path, tmp_path / "copy.vhd", disk_format=vhdkit.DiskFormat.DYNAMIC)
    assert content(tmp_path / "copy.vhd") == shown and problems(tmp_path / "copy.vhd") == []
    before = path.read_bytes()
    assert "blocks-overlap" in problems(path)
    with pytest.raises(errors.CorruptImage, match="points into another block"):
        vhdkit.merge(tmp_path / "leaf.avhd")
    (tmp_path / "leaf.avhd").unlink()
    refusals: list[Callable[[], object]] = [
        lambda: vhdkit.open_disk(path, writable=True),
        lambda: vhdkit.resize(path, 8 * BLOCK),
        lambda: vhdkit.compact(path),
    ]
    for refused in refusals:
        with pytest.raises(errors.CorruptImage, match="points into another block"):
            refused()
    assert path.read_bytes() == before
    done = vhdkit.repair(path)
    assert [(fix.code, fix.needs) for fix in done.fixes] == [("blocks-overlap", None)]
    assert done.report_path is not None
    report = json.loads(Path(done.report_path).read_text())
    assert report == {
        "image": str(path), "lost": [], "doubtful": [{"offset_bytes": BLOCK - 512, "size_bytes": 512}],
    }  # fmt: skip
    assert content(path) == shown and "blocks-overlap" not in problems(path)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(BLOCK - 512, b"\1" * 512)
    assert content(path)[BLOCK:] == shown[BLOCK:]


def test_overlapping_layers_are_not_merged_away(tmp_path: Path) -> None:
    """INV-BLOCKS-DISJOINT: a merge would remove data that a repair must examine: refused, unless into a new file."""
    vhdkit.create_image(tmp_path / "base.vhd", 4 * BLOCK, block_size_bytes=BLOCK)
    vhdkit.create_child(tmp_path / "leaf.avhd", tmp_path / "base.vhd")
    with vhdkit.open_disk(tmp_path / "leaf.avhd", writable=True) as disk:
        disk.write(0, pattern(2 * BLOCK))
    with FileStore.open(tmp_path / "leaf.avhd", writable=True) as store:
        bat = open_dynamic(store).bat
        entry = bat.block_start(0) // 512 + 100
        store.pwrite(bat.table_offset_bytes + 4, entry.to_bytes(4, "big"))
    with pytest.raises(errors.CorruptImage, match="points into another block"):
        vhdkit.merge(tmp_path / "leaf.avhd")
    assert sorted(os.listdir(tmp_path)) == ["base.vhd", "leaf.avhd"]
    vhdkit.merge(tmp_path / "leaf.avhd", to=tmp_path / "new.vhd")
    assert vhdkit.compare(tmp_path / "leaf.avhd", tmp_path / "new.vhd").same_content


def test_backups_replace_no_file(tmp_path: Path) -> None:
    """A backup or report never replaces a file, and if it cannot be written nothing is repaired."""
    image = damaged(tmp_path / "a.vhd")
    before = image.read_bytes()
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(errors.AlreadyExists):
        vhdkit.repair(image, undo=taken)
    with pytest.raises(errors.NotFound):
        vhdkit.repair(image, undo=tmp_path / "no" / "undo")
    assert taken.read_text() == "mine" and image.read_bytes() == before


def test_restoring_a_changed_image_is_refused(tmp_path: Path) -> None:
    """A backup of another image, of one written to since, a torn one or none at all: refused, nothing changes."""
    image, other, undo = (
        damaged(tmp_path / "a.vhd"),
        damaged(tmp_path / "b.vhd", unique_id=b"7" * 16),
        tmp_path / "undo",
    )
    vhdkit.repair(image, undo=undo)
    vhdkit.repair(other)
    for path in (other, tmp_path / "fixed.vhd"):
        if not path.exists():
            Vhd(disk_type=FIXED, size=MIB).build().write(path)
        before = path.read_bytes()
        with pytest.raises(errors.InvalidArgument, match="not as left by the repair"):
            vhdkit.restore(path, undo)
        assert path.read_bytes() == before
    with vhdkit.open_disk(image, writable=True) as disk:
        disk.write(3 * MIB, b"new block")
    with pytest.raises(errors.InvalidArgument):
        vhdkit.restore(image, undo)
    torn = tmp_path / "torn"
    torn.write_bytes(undo.read_bytes()[:-1])
    for bad in (torn, image):
        with pytest.raises(errors.InvalidArgument, match="not a complete backup"):
            vhdkit.restore(image, bad)
    with vhdkit.open_disk(image) as disk:
        assert disk.read(3 * MIB, 9) == b"new block"


def test_images_in_use_are_not_repaired(tmp_path: Path) -> None:
    """Even a reader prevents a repair: an image never changes while it is open."""
    image = tmp_path / "a.vhd"
    vhdkit.create_image(image, MIB)
    with vhdkit.open_disk(image), pytest.raises(errors.ImageInUse):
        vhdkit.repair(image)
    with vhdkit.open_disk(image), pytest.raises(errors.ImageInUse):
        vhdkit.restore(image, damaged_undo(tmp_path))


def damaged_undo(folder: Path) -> Path:
    """A complete backup of some image."""
    vhdkit.repair(damaged(folder / "other.vhd"), undo=folder / "other.undo")
    return folder / "other.undo"


def test_files_that_are_not_vhds(tmp_path: Path) -> None:
    """A raw disk has nothing to repair; a folder, an empty file and a missing one are reported as such."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(pattern(MIB))
    with pytest.raises(errors.InvalidArgument, match="--format vhd"):
        vhdkit.repair(raw)
    assert raw.read_bytes() == pattern(MIB)
    for path, kind in ((tmp_path, errors.InvalidArgument), (tmp_path / "none.vhd", errors.NotFound)):
        with pytest.raises(kind):
            vhdkit.repair(path)
    (tmp_path / "empty.vhd").touch()
    with pytest.raises(errors.InvalidArgument):
        vhdkit.repair(tmp_path / "empty.vhd")


def test_killed_at_any_call_a_repair_is_complete_or_undone(tmp_path: Path) -> None:
    """INV-REPAIR-WHOLE: killed at any call, the image reads as before or as repaired, and the next open settles it."""
    kept = damaged(tmp_path / "kept.bin", entries={5: 2}).read_bytes()
    home = tmp_path / "home"
    home.mkdir()
    image = home / "a.vhd"
    image.write_bytes(kept)
    seen = set()

    def work() -> None:
        vhdkit.repair(image, accept_data_loss=True, undo=home / "undo")

    for number in killings(work):
        with FileStore.open(image, writable=True) as store:
            view = pending.view(store)
            found = view.pread(0, view.size())
            pending.settle(store)
        assert image.read_bytes() == found
        seen.add(found == kept)
        if number > 0 and found != kept:
            assert set(problems(image)) <= {"undo-log-ignored", "leaked-space"}
            vhdkit.restore(image, home / "undo")
            assert image.read_bytes() == kept
        shutil.rmtree(home)
        home.mkdir()
        image.write_bytes(kept)
    assert seen == {True, False}


def test_killed_at_any_call_a_restore_is_complete_or_undone(tmp_path: Path) -> None:
    """INV-REPAIR-WHOLE, in reverse: a killed restore leaves the repaired image or the original."""
    image, undo = damaged(tmp_path / "a.vhd"), tmp_path / "undo"
    before = image.read_bytes()
    vhdkit.repair(image, undo=undo)
    after, seen = image.read_bytes(), set()
    for _ in killings(lambda: vhdkit.restore(image, undo)):
        with FileStore.open(image, writable=True) as store:
            pending.settle(store)
        seen.add(image.read_bytes())
        image.write_bytes(after)
    assert seen == {before, after}


@pytest.mark.parametrize("operation", ["pwrite", "fdatasync", "fsync", "link", "rename", "ftruncate"])
def test_faults_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """After ENOSPC or EIO at the n-th call, for every n: a typed error and the old image, or a complete repair."""
    image = damaged(tmp_path / "a.vhd")
    before, real, left = image.read_bytes(), getattr(os, operation), [0]

    def failing(*args: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28 if operation == "pwrite" else 5, "simulated")
        return real(*args)

    monkeypatch.setattr(os, operation, failing)
    for at in range(1, 40):
        left[0] = at
        try:
            vhdkit.repair(image)
        except errors.VhdkitError:
            left[0] = 0
            with FileStore.open(image, writable=True) as store:
                pending.settle(store)
            assert image.read_bytes() == before or set(problems(image)) <= {"undo-log-ignored"}
            image.write_bytes(before)
        else:
            break
    left[0] = 0
    assert (
        set(problems(image)) <= {"undo-log-ignored"}
        and [one for one in os.listdir(tmp_path) if one.endswith(".part")] == []
    )


def moved_parent(tmp_path: Path) -> tuple[Path, Path]:
    """A child, and its parent under another name in another folder."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.avhd"
    vhdkit.create_image(base, MIB)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"below")
    vhdkit.create_child(leaf, base)
    (tmp_path / "far").mkdir()
    return leaf, base.rename(tmp_path / "far" / "renamed.vhd")


def test_stale_names_are_rewritten(tmp_path: Path) -> None:
    """INV-PARENT-ID: a parent that was moved and renamed is found by its id, only in the folders the user named."""
    leaf, parent = moved_parent(tmp_path)
    before = leaf.read_bytes()
    assert vhdkit.repair(leaf).fixes == () and leaf.read_bytes() == before
    options = OpenOptions(parent_dirs=(str(parent.parent),))
    done = vhdkit.repair(leaf, options=options, undo=tmp_path / "undo")
    assert [fix.code for fix in done.fixes] == ["parent-names"] and list(done.findings) == []
    with vhdkit.open_disk(leaf, options=options) as disk:
        assert disk.read(0, 5) == b"below"
    vhdkit.restore(leaf, tmp_path / "undo")
    assert leaf.read_bytes() == before


def test_a_parent_found_by_its_bare_name_is_a_warning(tmp_path: Path) -> None:
    """If a parent is found only because it is nearby, check warns, as others would not find it; repair corrects it."""
    leaf, parent = moved_parent(tmp_path)
    (tmp_path / "far" / "base.vhd").hardlink_to(parent)
    parent.unlink()
    near = OpenOptions(parent_dirs=(str(tmp_path / "far"),))
    assert problems(leaf, near) == ["parent-names"]
    vhdkit.repair(leaf, options=near)
    assert problems(leaf, near) == []


def test_two_files_with_the_parents_id(tmp_path: Path) -> None:
    """With copies of the parent it is uncertain which one is meant, so nothing is written."""
    leaf, parent = moved_parent(tmp_path)
    shutil.copy(parent, parent.with_name("copy.vhd"))
    before = leaf.read_bytes()
    done = vhdkit.repair(leaf, options=OpenOptions(parent_dirs=(str(parent.parent),)))
    assert [fix.needs for fix in done.fixes] == ["vhdkit rebase"] and leaf.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../../etc/passwd", "link.vhd", "pipe.vhd", "self.avhd", "/dev/zero"]
)
def test_hostile_names_of_a_parent(tmp_path: Path, name: str) -> None:
    """INV-BOUNDED: with names that lead outside, to pipes, devices or the image itself, nothing hangs."""
    image = tmp_path / "self.avhd"
    (tmp_path / "link.vhd").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe.vhd")
    child(name, size=MIB, tail=b"", unique_id=b"\1" * 16, parent_id=b"\1" * 16).build().write(image)
    done = vhdkit.repair(image)
    assert [fix.code for fix in done.fixes] == ["footer", "geometry"][: len(done.fixes)]
    assert vhdkit.repair(image).fixes == ()


def test_marks_of_other_programs(tmp_path: Path) -> None:
    """A killed footer needs the user's consent; with it the image is repaired."""
    image = damaged(tmp_path / "a.vhd", tail=b"\xc7" * 512)
    done = vhdkit.repair(image)
    assert [fix.needs for fix in done.fixes] == [DEAD] and done.changed_bytes == 0
    with pytest.raises(errors.ImageInUse):
        vhdkit.open_disk(image, writable=True)
    vhdkit.repair(image, writer_is_dead=True)
    vhdkit.open_disk(image, writable=True).close()


@pytest.mark.parametrize("name", ["dfvfs/ext2.vhd.gz", "dfvfs/fat-differential.vhd.gz", "node-vhd/dynamic.vhd.gz"])
def test_samples_damaged_and_repaired(tmp_path: Path, name: str) -> None:
    """Real images read the same after losing a footer and getting it back; restoring gives back the damaged bytes."""
    raw = gzip.decompress(sample(name).read_bytes())
    image = tmp_path / "image.vhd"
    image.write_bytes(raw)
    whole = _content(image)
    for damage in (raw[:-512], raw[:-512] + b"\0" * 512, put(raw, 0, b"\xff" * 512), raw + pattern(1024)):
        image.write_bytes(damage)
        done = vhdkit.repair(image, undo=tmp_path / "undo")
        assert done.changed_bytes > 0
        assert _content(image) == whole
        vhdkit.restore(image, tmp_path / "undo")
        assert image.read_bytes() == damage
        (tmp_path / "undo").unlink()


def _content(image: Path) -> bytes:
    """What the image itself owns, as extents and bytes, without its parents."""
    with FileStore.open(image) as store:
        layer = open_dynamic(store)
        parts = []
        for one in layer.extents(0, layer.size_bytes // 512):
            parts.append(f"{one.kind}:{one.sector_index}+{one.sector_count};".encode())
            if one.kind is ExtentKind.DATA:
                assert one.store_offset_bytes is not None
                parts.append(store.pread(one.store_offset_bytes, one.size_bytes))
        return b"".join(parts)
