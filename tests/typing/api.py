# SPDX-License-Identifier: Apache-2.0
"""A user's program over the whole public interface. It is never run: it has to pass `mypy --strict`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import vhdkit


def sectors_of_the_leaf(path: Path) -> Iterator[tuple[int, bytes]]:
    """The parts of the disk that the leaf itself owns."""
    options = vhdkit.OpenOptions(parent_dirs=("bases",), allow_raw_parent=False, ignore_bitmaps=False)
    with vhdkit.open_disk(path, options=options) as disk:
        size: int = disk.size_bytes
        extents: Iterator[vhdkit.Extent] = disk.extents(0, size, find_holes=True)
        for extent in extents:
            if extent.layer_index == 0 and extent.kind is vhdkit.ExtentKind.DATA:
                yield extent.offset_bytes, disk.read(extent.offset_bytes, extent.size_bytes)


def change(path: Path) -> None:
    """Everything that writes."""
    size: int = vhdkit.create_image(path, 1 << 30, disk_format=vhdkit.DiskFormat.DYNAMIC, block_size_bytes=1 << 21)
    child = path.with_suffix(".avhd")
    vhdkit.create_child(child, path, size_bytes=size)
    with vhdkit.open_disk(child, writable=True) as disk:
        disk.write(0, b"bytes", fua=True)
        disk.write(512, memoryview(bytearray(512)))
        disk.write_zeroes(4096, 4096)
        disk.trim(0, 4096)
        disk.flush()
        buffer = bytearray(4096)
        disk.read_into(0, buffer)
        disk.read_into(0, memoryview(buffer)[:512])
    smaller: vhdkit.CompactResult = vhdkit.compact(child, dry_run=True)
    assert smaller.file_size_after_bytes <= smaller.file_size_before_bytes
    pulled: vhdkit.Pull = vhdkit.pull(child, to=path, relink=True)
    copied: vhdkit.CopiedLayers = vhdkit.copy_layers(
        child, path, above=path, parent=pulled.path, block_size_bytes="2M"
    )
    assert copied.data_bytes >= 0
    vhdkit.rebase(child, path, unsafe_new_id=True, dry_run=False)
    larger: vhdkit.ResizeResult = vhdkit.resize(child, 1 << 31, dry_run=True)
    assert larger.virtual_size_after_bytes == 1 << 31
    leaf: str = vhdkit.snapshot(child)
    leaves: list[str] = vhdkit.snapshot_many([(leaf, None), (path, path.with_suffix(".new"))], dry_run=True)
    moves: list[vhdkit.Move] = vhdkit.relocate(leaf, "elsewhere", dry_run=True)
    leaves += [move.new_path for move in moves]
    items: list[vhdkit.GarbageItem] = vhdkit.collect_garbage(path.parent, leaves, delete=False)
    leaves += [item.path for item in items if item.kind is vhdkit.GarbageKind.IMAGE]
    leaves += vhdkit.clone(path, [path.with_suffix(".a"), "b.avhd"])
    planned: vhdkit.Merge = vhdkit.merge(child, into=path, dry_run=True, relink_children=True)
    if vhdkit.merge_under_way(child) is None and planned.data_bytes:
        done: vhdkit.Merge = vhdkit.merge(child, to=path.with_suffix(".new.vhd"))
        del done
    else:
        vhdkit.resume_merge(child)


def examine(path: Path) -> int:
    """Everything that only reads; returns an exit code."""

    def progress(done_bytes: int, size_bytes: int) -> None:
        del done_bytes, size_bytes

    done: vhdkit.Repair = vhdkit.repair(path, accept_data_loss=True, undo="undo", dry_run=True)
    restored: int = vhdkit.restore(path, "undo")
    fixes: list[vhdkit.Fix] = [fix for fix in done.fixes if fix.needs is None]
    del restored, fixes
    try:
        findings: list[vhdkit.Finding] = vhdkit.check(path)
        vhdkit.convert(path, path.with_suffix(".raw"), vhdkit.DiskFormat.RAW, replace=True, progress=progress)
        result: vhdkit.Comparison = vhdkit.compare(path, path.with_suffix(".raw"), progress=progress)
    except vhdkit.CorruptImage as error:
        reason: vhdkit.CorruptReason = error.reason
        offset: int | None = error.offset_bytes
        del reason, offset
        return error.exit_code
    except vhdkit.VhdkitError as error:
        return error.exit_code
    worst = max((finding.severity for finding in findings), default=vhdkit.Severity.NOTE)
    return int(worst is vhdkit.Severity.ERROR or not result.same_content)


def freeze(control: Path) -> list[str]:
    """Ask a running server for a snapshot of all that it serves."""
    with vhdkit.ControlClient(str(control)) as client:
        done: dict[str, list[dict[str, str]]] = client.call("snapshot")
    return [row["leaf"] for row in done["snapshots"]]
