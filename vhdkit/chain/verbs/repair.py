# SPDX-License-Identifier: Apache-2.0
"""Repairs an image in place, and undoes a repair.

Decides that a repair is one change: planned on a draft, examined, backed up if the user wants that, then written to
the file whole or not at all. What a damaged file needs is decided by its format; only the parent's
names are repaired here, because a parent is found by the rules of `parents`.

    draft -> examined -> backup and report durable -> pending.change (undo log beside the image) -> examined again

`INV-REPAIR-WHOLE`: after a cut the image is as it was before the repair, or repaired.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names.lineage import same_content
from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.names.noted import write_noted
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import allowed_folders, find_by_id, find_parent, leads_to
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.check import check
from vhdkit.chain.verbs.compact import zero_ranges
from vhdkit.chain.verbs.create import names_of
from vhdkit.errors import printable
from vhdkit.finding import Finding
from vhdkit.folder import NewFile, exists, real_path
from vhdkit.formats import remember
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix, Format
from vhdkit.formats.probe import format_of
from vhdkit.formats.undo import Change, UndoLog, encode, plan_change, read_log
from vhdkit.store import FileStore, Store


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did, or would do. `findings` are from an examination of the whole chain afterwards.

    `undo_path` is the requested backup, `report_path` the list of dropped ranges; None if there is none.
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
    are written to `report`, by default beside the image. `writer_is_dead` allows another program's mark to be
    removed. `undo` names a new file for a backup of every byte that changes, for `restore`. `progress` covers the
    examinations before and after. What a killed server noted in the options' `notes_folder` is written to the image
    before it is repaired; `accept_data_loss` gives up what it noted elsewhere.
    Raises NotesUnwritten for such notes otherwise, ImageInUse if the image is open anywhere, InvalidArgument for a
    file that is not a VHD, one on a device, or a repair that is too large, AlreadyExists for a backup or report that
    exists, NoSpace, IoFailed, and what `check` raises.
    """
    options, consent = options or OpenOptions(), Consent(accept_data_loss, writer_is_dead)
    image_path = os.fsdecode(path)
    with _prepare(image_path, options, dry_run=dry_run, accept_data_loss=accept_data_loss) as store:
        planned = _plan(store, _format_to_repair(pending.view(store), options), options, consent, progress)
        if dry_run:
            return Repair(image_path, planned.fixes, _size_of(planned.writes), planned.left)
        undo_path, report_path = _run(store, planned, undo, report, image_path)
    findings = check(image_path, options=options, progress=progress)
    return Repair(image_path, planned.fixes, _size_of(planned.writes), tuple(findings), undo_path, report_path)


@dataclass(frozen=True, slots=True)
class _RepairPlan:
    """A repair as it was made on a draft. `log` is the change, None if there is none; `left` is found afterwards."""

    fixes: tuple[Fix, ...]
    writes: tuple[tuple[int, bytes], ...]
    size_bytes: int
    log: UndoLog | None
    left: tuple[Finding, ...]


def _plan(
    store: FileStore, image_format: Format, options: OpenOptions, consent: Consent, progress: Progress | None
) -> _RepairPlan:
    """Make the repair on a draft over the image, which is not changed."""
    view = pending.view(store)
    draft = DraftStore(view)
    fixes = image_format.repair(draft, consent)
    fixes += _repoint(image_format, draft, store, options)
    fixes += image_format.settle(draft)
    left = image_format.check(draft, progress=progress)
    writes = draft.diff()
    log = None
    if writes or draft.size() != view.size():
        log = plan_change(view, pending.id_of(draft), writes, draft.size())
    return _RepairPlan(tuple(fixes), tuple(writes), draft.size(), log, tuple(left))


@contextlib.contextmanager
def _prepare(image_path: str, options: OpenOptions, *, dry_run: bool, accept_data_loss: bool) -> Iterator[FileStore]:
    """The image, held exclusively; unless `dry_run`, earlier unfinished changes are settled.

    What a killed server noted in the folder of the options is written to the image first, if that can be opened for
    writing. Otherwise the notes are void, because they describe the state before the repair; their files are kept.
    Notes in another folder become void only if the loss is accepted.
    """
    if not dry_run and options.notes_folder is not None:
        with contextlib.suppress(errors.CorruptImage):
            _write_noted(image_path, options)
    with FileStore.open_held(image_path, writable=not dry_run) as store:
        if store.is_device:
            raise errors.InvalidArgument(
                "is a device, where an interrupted repair could not be undone",
                path=image_path,
                hint="copy it to a file, and repair that",
            )
        store.notes_folder = options.notes_folder
        if not accept_data_loss:
            remember.refuse_unwritten(store)
        store.notes_folder = None  # what was there is in the image by now, or cannot be written to it
        if not dry_run:
            remember.renounce(store, "the image is repaired without them")
            pending.settle(store)
            remember.acknowledge(store)
        yield store


def _write_noted(image_path: str, options: OpenOptions) -> None:
    with FileStore.open(image_path) as store:
        store.notes_folder = options.notes_folder
        if not store.is_device:
            write_noted(store, options)


def _run(
    store: FileStore, planned: _RepairPlan, undo: AnyPath | None, report: AnyPath | None, image_path: str
) -> tuple[str | None, str | None]:
    """Carry out the repair; returns the paths of the backup and of the report, None for those not written."""
    if planned.log is None:
        return None, None
    undo_path = _write_backup(undo, planned.log, store)
    report_path = _write_report(report, image_path, planned.fixes, store)
    # Lost content reads differently through the image's children, too: they need the warning.
    with same_content(store.name) if report_path is None else contextlib.nullcontext():
        pending.change(store, planned.writes, planned.size_bytes, unique_id=planned.log.unique_id)
        _give_back(store, planned.log)
    return undo_path, report_path


@checked
def restore(path: AnyPath, undo: AnyPath) -> int:
    """Undo a repair with the backup it wrote; returns how many bytes were restored.

    Raises InvalidArgument if the file is not a backup, belongs to another image, or the image was changed since;
    ImageInUse, NoSpace, IoFailed.
    """
    image_path, undo_path = os.fsdecode(path), os.fsdecode(undo)
    with FileStore.open(undo_path) as record:
        log = read_log(record)
    if log is None:
        raise errors.InvalidArgument("is not a complete backup of a repair", path=undo_path)
    with FileStore.open_held(image_path, writable=True) as store:
        pending.settle(store)
        if not _is_repaired(store, log):
            raise errors.InvalidArgument(
                f"is not as left by the repair with the backup {printable(undo_path)}: it has since been changed, or"
                " is another image",
                path=image_path,
            )
        writes = [(change.offset_bytes, change.before) for change in log.changes]
        pending.change(store, writes, log.size_before_bytes, unique_id=log.unique_id)
    return _size_of(writes)


def _format_to_repair(store: Store, options: OpenOptions) -> Format:
    """The format of the image; if all its structures are lost, by its name or the user's option.

    Raises InvalidArgument for a raw disk, UnsupportedFormat.
    """
    try:
        found = format_of(store, options.format_name)
    except errors.CorruptImage:
        called = formats.by_suffix(store.name)
        if called is None:
            raise
        return called
    if found.is_plain:
        raise errors.InvalidArgument(
            "is a raw disk: it has no structures to repair",
            path=store.name,
            hint="if it is a VHD that lost its footers, add --format vhd",
        )
    return found


def _size_of(writes: Sequence[tuple[int, bytes]]) -> int:
    return sum(len(raw) for _, raw in writes)


def _repoint(image_format: Format, draft: DraftStore, store: FileStore, options: OpenOptions) -> list[Fix]:
    """Rewrite the parent's names if they are unreadable or do not lead to it, once it is found by a name or its id."""
    try:
        facts = image_format.facts(draft)
        if facts.parent is None:
            return []
        folders, parents = allowed_folders(store.name, options.parent_dirs), []
        try:
            with find_parent(facts, folders, options) as found:
                parent = found.name
        except errors.ParentError:
            if facts.parent.raw_allowed:
                return []
            parents = find_by_id(facts.parent.linkage_ids, folders, apart_from=store.identity)
            if len(parents) > 1:
                names = ", ".join(printable(one) for one in parents[:4])
                return [Fix("parent-names", f"several files have the id of its parent: {names}", "vhdkit rebase")]
            if not parents:
                return []
            parent = parents[0]
        if leads_to(facts, parent, folders) and facts.parent.is_whole:
            return []
        ref = names_of(real_path(store.name), parent, facts.parent.linkage_id, facts.parent.timestamp)
        ref = replace(ref, linkage_ids=facts.parent.linkage_ids)
        if store.writable:
            mark_child(store.name, draft, parent)
        image_format.relink(draft, ref)
    except (errors.CorruptImage, errors.ImageInUse):  # other damage was not repaired
        return []
    how = ", found by its id" if parents else ""
    return [Fix("parent-names", f"the names of the parent now lead to {printable(parent)}{how}")]


def _write_backup(undo: AnyPath | None, log: UndoLog, store: FileStore) -> str | None:
    """Write the backup for the user, durably."""
    if undo is None:
        return None
    with NewFile(undo, like=store) as new:
        new.store.pwrite(0, encode(log))
        new.commit()
    return os.fsdecode(undo)


def _write_report(report: AnyPath | None, image_path: str, fixes: Sequence[Fix], store: FileStore) -> str | None:
    """Write the ranges of the disk that lose their content, or may show foreign data; None if there are none."""
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
    """Turn what became zeros into holes where possible: the content does not change, so no log is needed."""
    for change in log.changes:
        after = change.after[: max(log.size_after_bytes - change.offset_bytes, 0)]
        for start, end in zero_ranges(after):
            store.punch(change.offset_bytes + start, end - start)


def _is_repaired(store: Store, log: UndoLog) -> bool:
    """True if the file still holds exactly the result of the change, wherever it changed."""
    if store.size() != log.size_after_bytes:
        return False
    return all(_holds(store, change) for change in log.changes)


def _holds(store: Store, change: Change) -> bool:
    inside = max(min(len(change.after), store.size() - change.offset_bytes), 0)
    return inside == 0 or store.pread(change.offset_bytes, inside) == change.after[:inside]
