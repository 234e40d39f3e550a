# SPDX-License-Identifier: Apache-2.0
"""Repairs of VHDX files: complete or not at all, undone byte for byte, found clean by others, children kept."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import uuid
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings
from tests.support import daily_or_nightly, require_tool, run, sample
from tests.vhdkit.formats.vhdx.damaged import HARMLESS, LOSSY, base, child, content
from vhdkit import OpenOptions, Severity, errors
from vhdkit.chain.records import pending
from vhdkit.formats.vhdx.relink import relink
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB

SIZE = 4 * MIB
EVERY_FAULT = [*dict.fromkeys(["log", "identifier", "over the BAT", "headers", "tables", *HARMLESS, *LOSSY])]


def write(path: Path, *faults: str, of: str = "base") -> Path:
    """A file with these faults."""
    store = base() if of == "base" else child()
    for fault in faults:
        (HARMLESS | LOSSY)[fault][1](store)
    path.write_bytes(store.contents())
    return path


def problems(path: Path, options: OpenOptions | None = None) -> list[str]:
    """The codes of findings worse than notes."""
    return [one.code for one in vhdkit.check(path, options=options) if one.severity > Severity.NOTE]


def shown(path: Path) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


def test_a_repair_can_be_undone(tmp_path: Path) -> None:
    """A dry run writes nothing; a repaired image is clean, and its backup restores every byte."""
    path, undo = write(tmp_path / "disk.vhdx", "log", "header 1", "table 2"), tmp_path / "undo"
    before = path.read_bytes()
    planned = vhdkit.repair(path, dry_run=True)
    assert path.read_bytes() == before and not any(one.severity for one in planned.findings)
    done = vhdkit.repair(path, undo=undo)
    assert [fix.code for fix in done.fixes] == [fix.code for fix in planned.fixes]
    assert [fix.code for fix in done.fixes] == ["header-damaged", "log-not-replayed", "region-table-damaged"]
    assert problems(path) == [] and done.report_path is None
    assert vhdkit.restore(path, undo) == done.changed_bytes and path.read_bytes() == before
    vhdkit.repair(path)
    assert vhdkit.repair(path).fixes == ()
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, b"new")
    with pytest.raises(errors.InvalidArgument, match="not as left by the repair"):
        vhdkit.restore(path, undo)


def test_data_is_dropped_only_with_consent_and_reported(tmp_path: Path) -> None:
    """The report beside the image lists what is lost, and what is doubtful."""
    path = write(tmp_path / "disk.vhdx", "over the BAT", "state 4")
    before = path.read_bytes()
    assert [fix.needs for fix in vhdkit.repair(path).fixes] == ["--accept-data-loss"] and path.read_bytes() == before
    done = vhdkit.repair(path, accept_data_loss=True)
    assert done.report_path == str(tmp_path / "disk.vhdx.lost.json") and problems(path) == []
    report = json.loads(Path(done.report_path).read_text())
    assert report["lost"] == [{"offset_bytes": 2 * MIB, "size_bytes": MIB}]
    assert report["doubtful"] == [{"offset_bytes": 0, "size_bytes": MIB}]
    assert shown(path)[2 * MIB : 3 * MIB] == bytes(MIB) and shown(path)[:MIB] == content(base())[:MIB]


@pytest.mark.parametrize("faults", [("header 2", "over the BAT"), ("identifier", "table 1")][: daily_or_nightly(1, 2)])
def test_killed_at_any_call_a_repair_is_complete_or_undone(tmp_path: Path, faults: tuple[str, ...]) -> None:
    """INV-REPAIR-WHOLE: killed at any call, the image reads as before or as repaired, and the next open settles it."""
    kept = write(tmp_path / "kept.bin", *faults).read_bytes()
    home = tmp_path / "home"
    home.mkdir()
    path, seen = home / "disk.vhdx", set()
    path.write_bytes(kept)
    for number in killings(lambda: vhdkit.repair(path, accept_data_loss=True, undo=home / "undo")):
        with FileStore.open(path, writable=True) as store:
            view = pending.view(store)
            found = view.pread(0, view.size())
            pending.settle(store)
        assert path.read_bytes() == found
        seen.add(found == kept)
        if number > 0 and found != kept:
            assert set(problems(path)) <= {"undo-log-ignored"}
            vhdkit.restore(path, home / "undo")
            assert path.read_bytes() == kept
        shutil.rmtree(home)
        home.mkdir()
        path.write_bytes(kept)
    assert seen == {True, False}


def test_an_undo_log_of_another_image_is_ignored(tmp_path: Path) -> None:
    """The ids in the headers are used once: a log beside an image that another program has written to is not used."""
    path = write(tmp_path / "disk.vhdx", "header 1")
    before = path.read_bytes()
    for _ in killings(lambda: vhdkit.repair(path)):
        with FileStore.open(path) as store:
            if any(one.code == "change-unfinished" for one in pending.look(store).findings):
                break
        path.write_bytes(before)
    log = Path(pending.undo_path(str(path))).read_bytes()
    with FileStore.open(path) as store:
        assert pending.view(store).pread(0, len(before)) == before
    path.write_bytes(base().contents())
    Path(pending.undo_path(str(path))).write_bytes(log)
    assert problems(path) == ["undo-log-ignored"] and shown(path) == content(base())


def family(tmp_path: Path) -> tuple[Path, Path]:
    """A base with data, and a child with data."""
    below, leaf = tmp_path / "base.vhdx", tmp_path / "leaf.avhdx"
    vhdkit.create_image(below, SIZE, disk_format="vhdx", block_size_bytes=MIB)
    with vhdkit.open_disk(below, writable=True) as disk:
        disk.write(0, random.Random(1).randbytes(3 * MIB))
    vhdkit.create_child(leaf, below, block_size_bytes=MIB)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(MIB, b"above" * 1000)
    return below, leaf


def damage(path: Path, offset: int, raw: bytes) -> None:
    """Change bytes of a file as a bad sector does: its times stay."""
    times = path.stat()
    with FileStore.open(path, writable=True) as store:
        store.pwrite(offset, raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_children_open_after_a_repair_of_their_parent(tmp_path: Path) -> None:
    """The id that they recorded stays. If content was lost, they are warned; the parent's headers may be damaged."""
    below, leaf = family(tmp_path)
    expected = shown(leaf)
    damage(below, 64 * KIB + 8, b"garbage")
    assert [fix.code for fix in vhdkit.repair(below).fixes] == ["header-damaged"]
    assert shown(leaf) == expected and problems(leaf) == []
    damage(below, 3 * MIB, (64 * MIB | 6).to_bytes(8, "little"))
    with pytest.raises(errors.CorruptImage):
        shown(leaf)
    vhdkit.repair(below, accept_data_loss=True)
    assert shown(leaf) == bytes(MIB) + expected[MIB:]
    assert problems(leaf) == ["parent-written"]


def test_names_are_rewritten_once_the_parent_is_found(tmp_path: Path) -> None:
    """A renamed parent is found by its id, also where the locator could not be read; both accepted ids are kept."""
    below, leaf = family(tmp_path)
    expected = shown(leaf)
    with FileStore.open(leaf, writable=True) as store:
        facts = vhdkit.formats.probed(store).facts(store)
        assert facts.parent is not None
        two = (facts.parent.linkage_ids[0], uuid.UUID(int=3).bytes)
        ref = type(facts.parent)(two, 0, facts.parent.names)
        layer = vhdkit.formats.probed(store).open(store, writable=True)
        relink(layer, ref)  # type: ignore[arg-type]  # it is a VHDX
    renamed = below.rename(tmp_path / "renamed.vhdx")
    done = vhdkit.repair(leaf)
    assert [fix.code for fix in done.fixes] == ["parent-names"] and list(done.findings) == []
    assert shown(leaf) == expected
    with FileStore.open(leaf) as store:
        again = vhdkit.formats.probed(store).facts(store).parent
    assert again is not None and again.linkage_ids == two
    raw = leaf.read_bytes()
    leaf.write_bytes(raw.replace("renamed.vhdx".encode("utf-16-le"), "\0".encode("utf-16-le") * 12))
    assert problems(leaf) == ["locator-text"]
    done = vhdkit.repair(leaf)
    assert [fix.code for fix in done.fixes] == ["locator", "parent-names"] and shown(leaf) == expected
    shutil.copy(renamed, tmp_path / "copy.vhdx")
    renamed.rename(tmp_path / "other.vhdx")
    assert [fix.needs for fix in vhdkit.repair(leaf).fixes] == ["vhdkit rebase"]


def test_images_in_use_and_other_files(tmp_path: Path) -> None:
    """Even a reader prevents a repair; an empty file and one with nothing of a disk are refused or left."""
    path = write(tmp_path / "disk.vhdx")
    with vhdkit.open_disk(path), pytest.raises(errors.ImageInUse):
        vhdkit.repair(path)
    (tmp_path / "empty.vhdx").touch()
    with pytest.raises(errors.InvalidArgument):
        vhdkit.repair(tmp_path / "empty.vhdx")
    (tmp_path / "zeros.vhdx").write_bytes(bytes(3 * MIB))
    done = vhdkit.repair(tmp_path / "zeros.vhdx", accept_data_loss=True)
    assert done.fixes == () and [one.code for one in done.findings] == ["file-identifier"]


@pytest.mark.parametrize("name", ["discutils/vhdx-log-replay.vhdx.gz", "discutils/swap.vhdx.gz"])
def test_samples_damaged_and_repaired(tmp_path: Path, name: str) -> None:
    """Files that Windows wrote, one with a dirty log, read the same after losing a header and a region table."""
    path = tmp_path / "disk.vhdx"
    path.write_bytes(gzip.decompress(sample(name).read_bytes()))
    expected = hash_of(path)
    for offset in (128 * KIB, 192 * KIB):
        damage(path, offset, b"\0" * 512)
    done = vhdkit.repair(path, undo=tmp_path / "undo")
    assert not any(fix.needs or fix.lost or fix.doubtful for fix in done.fixes) and len(done.fixes) >= 2
    assert hash_of(path) == expected and problems(path) == []
    run([require_tool("qemu-img"), "check", "-f", "vhdx", path])
    vhdkit.restore(path, tmp_path / "undo")
    assert hash_of(path) == expected and problems(path) == ["header-damaged", "region-table-damaged"]


def hash_of(path: Path) -> str:
    """The SHA-256 of what the image owns, and where."""
    found = hashlib.sha256()
    with FileStore.open(path) as store:
        layer = vhdkit.formats.probed(store).open(store)
        for one in layer.extents(0, layer.size_bytes // 512):
            found.update(f"{one.kind} {one.sector_index} {one.sector_count}".encode())
            if one.store_offset_bytes is not None:
                found.update(store.pread(one.store_offset_bytes, one.size_bytes))
    return found.hexdigest()


@pytest.mark.interop
@pytest.mark.parametrize("fault", EVERY_FAULT[: daily_or_nightly(5, 99)])
def test_other_programs_find_nothing_wrong(tmp_path: Path, fault: str) -> None:
    """qemu-img and 7-Zip accept a repaired image, and qemu-img reads it as vhdkit does."""
    qemu_img, seven_zip = require_tool("qemu-img"), require_tool("7zz")
    path = write(tmp_path / "disk.vhdx", fault)
    vhdkit.repair(path, accept_data_loss=True)
    assert problems(path) == []
    run([qemu_img, "check", "-f", "vhdx", path])
    (tmp_path / "disk.raw").write_bytes(shown(path))
    run([qemu_img, "compare", "-f", "vhdx", "-F", "raw", path, tmp_path / "disk.raw"])
    assert "Errors:" not in run([seven_zip, "t", path]).stdout
