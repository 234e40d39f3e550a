# SPDX-License-Identifier: Apache-2.0
"""Repairing an image in place, and undoing a repair.

Decides that a repair is one change: planned on a draft, examined, backed up if the user wants that, then written into
the file whole or not at all. What a damaged file needs is decided in `formats.vhd.repair`; only the parent's
names are repaired here, because a parent is found by the rules of `parents`.

    draft -> examined -> backup and report durable -> pending.change (undo log beside the image) -> examined again

`INV-REPAIR-WHOLE`: after a cut the image is as it was before the repair, or repaired.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from vhdkit import errors
from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names.lineage import same_content
from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.names.resolve import (
    NULL_ID,
    OpenOptions,
    allowed_folders,
    find_by_id,
    find_parent,
    leads_to,
)
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.check import check
from vhdkit.chain.verbs.compact import zero_ranges
from vhdkit.chain.verbs.create import link_to
from vhdkit.errors import printable
from vhdkit.finding import Finding
from vhdkit.folder import NewFile, exists, real_path
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.probe import FormatName, identify
from vhdkit.formats.undo import Change, UndoLog, encode, plan_change, read_log
from vhdkit.formats.vhd import recall
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.check import check_vhd
from vhdkit.formats.vhd.dynamic import open_dynamic
from vhdkit.formats.vhd.front import behind_first_block, settle_front
from vhdkit.formats.vhd.metadata import image_id, read_metadata
from vhdkit.formats.vhd.relink import relink
from vhdkit.formats.vhd.repair import Consent, Fix, repair_vhd
from vhdkit.store import FileStore, Store


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did, or would do. `findings` is what an examination of the whole chain says afterwards.

    `undo_path` is the backup that was asked for, `report_path` the list of dropped ranges; None where there is none.
    """

    path: str
    fixes: tuple[Fix, ...]
    changed_bytes: int
    findings: tuple[Finding, ...]
    undo_path: str | None = None
    report_path: str | None = None


@checked
def repair(
    path: AnyPath,
    *,
    accept_data_loss: bool = False,
    writer_is_dead: bool = False,
    undo: AnyPath | None = None,
    report: AnyPath | None = None,
    options: OpenOptions | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Repair:
    """Repair one image as far as possible (its parents are left alone); returns what was done, and what remains.

    `accept_data_loss` allows impossible BAT entries to be cleared: the ranges of the disk that lose their content
    are written to `report`, by default beside the image. `writer_is_dead` allows the mark of another program to be
    removed. `undo` names a new file for a backup of every byte that changes, for `restore`. `progress` is that of the
    examinations before and after.
    Raises ImageInUse if the image is open anywhere, InvalidArgument for a file that is not a VHD, one on a device, or
    a repair that is too large, AlreadyExists for a backup or report that exists, NoSpace, IoFailed, and what `check`
    raises.
    """
    options = options or OpenOptions()
    image_path = os.fsdecode(path)
    with FileStore.open_held(image_path, writable=not dry_run) as store:
        if store.is_device:
            raise errors.InvalidArgument(
                "is a device, where a repair that is interrupted could not be taken back",
                path=image_path,
                hint="copy it to a file, and repair that",
            )
        if not dry_run:
            pending.settle(store)
            recall.acknowledge(store)
        view = pending.view(store)
        _refuse_other_formats(view, options)
        draft = DraftStore(view)
        fixes = repair_vhd(draft, Consent(accept_data_loss, writer_is_dead))
        fixes += _repoint(draft, store, options)
        fixes += _bring_to_front(draft)
        left = check_vhd(draft, progress=progress)
        writes = draft.diff()
        undo_path = report_path = None
        if writes or draft.size() != view.size():
            log = plan_change(view, image_id(draft), writes, draft.size())
            if not dry_run:
                undo_path = _write_backup(undo, log, store)
                report_path = _write_report(report, image_path, fixes, store)
                # What lost content reads differently through its children, too: they are to be warned.
                with same_content(store.name) if report_path is None else contextlib.nullcontext():
                    pending.change(store, writes, draft.size(), unique_id=log.unique_id)
                    _give_back(store, log)
        if dry_run:
            return Repair(image_path, tuple(fixes), _size_of(writes), tuple(left))
    findings = check(image_path, options=options, progress=progress)
    return Repair(image_path, tuple(fixes), _size_of(writes), tuple(findings), undo_path, report_path)


@checked
def restore(path: AnyPath, undo: AnyPath) -> int:
    """Undo a repair with the backup it wrote; returns how many bytes were restored.

    Raises InvalidArgument for a file that is not a backup, or if the image is another one or was changed since;
    ImageInUse, NoSpace, IoFailed.
    """
    image_path, undo_path = os.fsdecode(path), os.fsdecode(undo)
    with FileStore.open(undo_path) as record:
        log = read_log(record)
    if log is None:
        raise errors.InvalidArgument("is not a whole backup of a repair", path=undo_path)
    with FileStore.open_held(image_path, writable=True) as store:
        pending.settle(store)
        if not _is_repaired(store, log):
            raise errors.InvalidArgument(
                f"is not as the repair left it whose backup is {printable(undo_path)}: it was changed since, or is"
                " another image",
                path=image_path,
            )
        writes = [(change.offset_bytes, change.before) for change in log.changes]
        pending.change(store, writes, log.size_before_bytes, unique_id=log.unique_id)
    return _size_of(writes)


def _refuse_other_formats(store: Store, options: OpenOptions) -> None:
    """Raise for what is not a VHD; one without any good footer is taken for one by its name or the user's word."""
    try:
        name = options.format_name or identify(store)
    except errors.CorruptImage:
        return
    if name is FormatName.RAW:
        raise errors.InvalidArgument(
            "is a raw disk: it has no structures to repair",
            path=store.name,
            hint="if it is a VHD that lost its footers, say --format vhd",
        )


def _size_of(writes: Sequence[tuple[int, bytes]]) -> int:
    return sum(len(raw) for _, raw in writes)


def _repoint(draft: DraftStore, store: FileStore, options: OpenOptions) -> list[Fix]:
    """Names of the parent that cannot be read or do not lead to it: written anew when it is found, or its id is."""
    try:
        metadata = read_metadata(draft)
        if metadata.header is None or not metadata.is_differencing:
            return []
        folders, parents = allowed_folders(store.name, options.parent_dirs), []
        try:
            with find_parent(metadata, folders, options) as found:
                parent = found.name
        except errors.ParentError:
            if metadata.header.parent_unique_id == NULL_ID:
                return []
            parents = find_by_id(metadata.header.parent_unique_id, folders, apart_from=store.identity)
            if len(parents) > 1:
                names = ", ".join(printable(one) for one in parents[:4])
                return [Fix("parent-names", f"several files are its parent by their id: {names}", "vhdkit rebase")]
            if not parents:
                return []
            parent = parents[0]
        if leads_to(metadata, parent, folders) and all(one.fault is None for one in metadata.locators):
            return []
        recorded = metadata.header.parent_unique_id
        link = link_to(real_path(store.name), parent, recorded, metadata.header.parent_timestamp)
        if store.writable:
            mark_child(store.name, draft, parent, recorded)
        relink(open_dynamic(draft, writable=True), link)
    except (errors.CorruptImage, errors.ImageInUse):  # what else is wrong with it was not put right
        return []
    how = ", found by its id" if parents else ""
    return [Fix("parent-names", f"the names of the parent lead to {printable(parent)} now{how}")]


def _bring_to_front(draft: DraftStore) -> list[Fix]:
    """Header and names of the parent that lie behind blocks."""
    try:
        metadata = read_metadata(draft)
        if metadata.header is None:
            return []
        bat = Bat.load(draft, metadata.header.table_offset, metadata.block_count)
        if not behind_first_block(metadata, bat) or not settle_front(open_dynamic(draft, writable=True)):
            return []
    except (errors.CorruptImage, errors.ImageInUse):  # what else is wrong with it was not put right
        return []
    return [Fix("behind-blocks", "header and names of the parent lay behind the first block: they lie before it now")]


def _write_backup(undo: AnyPath | None, log: UndoLog, store: FileStore) -> str | None:
    """The backup for the user, durable when this returns."""
    if undo is None:
        return None
    with NewFile(undo, like=store) as new:
        new.store.pwrite(0, encode(log))
        new.commit()
    return os.fsdecode(undo)


def _write_report(report: AnyPath | None, image_path: str, fixes: Sequence[Fix], store: FileStore) -> str | None:
    """The ranges of the disk that lose their content, or show what may belong elsewhere; None when there are none."""
    done = [fix for fix in fixes if fix.needs is None]
    lost = [one for fix in done for one in fix.lost]
    doubtful = [one for fix in done for one in fix.doubtful]
    if not lost and not doubtful:
        return None
    path = os.fsdecode(report) if report is not None else _free_name(image_path)
    document = {
        "image": image_path,
        "lost": [{"offset_bytes": offset, "size_bytes": size} for offset, size in lost],
        "doubtful": [{"offset_bytes": offset, "size_bytes": size} for offset, size in doubtful],
    }
    with NewFile(path, like=store) as new:
        new.store.pwrite(0, json.dumps(document, indent=2).encode() + b"\n")
        new.commit()
    return path


def _free_name(image_path: str) -> str:
    number, path = 1, f"{image_path}.lost.json"
    while exists(path):
        number += 1
        path = f"{image_path}.lost-{number}.json"
    return path


def _give_back(store: FileStore, log: UndoLog) -> None:
    """What was made zeros may become holes: the content does not change, so no log is needed."""
    for change in log.changes:
        after = change.after[: max(log.size_after_bytes - change.offset_bytes, 0)]
        for start, end in zero_ranges(after):
            store.punch(change.offset_bytes + start, end - start)


def _is_repaired(store: Store, log: UndoLog) -> bool:
    """True when the file is exactly what the change made of it, wherever it changed."""
    if store.size() != log.size_after_bytes:
        return False
    return all(_holds(store, change) for change in log.changes)


def _holds(store: Store, change: Change) -> bool:
    inside = max(min(len(change.after), store.size() - change.offset_bytes), 0)
    return inside == 0 or store.pread(change.offset_bytes, inside) == change.after[:inside]
