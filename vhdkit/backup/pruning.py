# SPDX-License-Identifier: Apache-2.0
"""Carrying out a prune or a deletion, and finishing one that was interrupted.

Decides in which order files change and what is refused. Which nights stay is decided in `keep`, what happens to their
images in `prune`, how records follow in `renewal`.

    1  journal (`prune.json`): the nights, the removals, the mergings        nothing has changed
    2  leases are read again: a reader makes its lease first and then looks for the journal, so one sees the other
    3  each dropped night's manifest is marked, or removed if no image that it describes is needed any more
    4  images on which nothing stands are removed
    5  one merging after the other: the journal names it; copy; children; sums and manifests (`renewal`); sources go
    6  manifests of dropped nights that describe no image any more, their other files, tables without an image
    7  no journal

After any interruption every night that was kept can be read, and `finish` goes on: what is left to do follows from the
manifests, and the journal says which images may be removed that no manifest names. Nothing is ever merged whose sums
are wrong. Where there is no space for the journal, a deletion that only removes works without one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import tzinfo
from typing import TypeAlias

from vhdkit import errors
from vhdkit.backup.bases import remove_unused_bases
from vhdkit.backup.copy_switch import finish_switch
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import Images
from vhdkit.backup.journal import PruneJournal, journal_or_rest, remove_journal, write_journal
from vhdkit.backup.keep import DatedNight, KeepRules, reasons_to_keep
from vhdkit.backup.leases import drop_dead, leased_nights, leases
from vhdkit.backup.leftovers import remove_whole
from vhdkit.backup.manifest import Manifest
from vhdkit.backup.names import SUMS_SUFFIX, ImagePlace, night_word
from vhdkit.backup.prune import ImageMerge, PrunePlan, plan_prune
from vhdkit.backup.renewal import Renewal, sidecars
from vhdkit.backup.repository import MAX_FILES, META, SWITCH_FILE, MachineFolder, Night
from vhdkit.backup.verify import known_results
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records.intent import intent_of
from vhdkit.chain.verbs.merge_in_place import plan_in_place, prepare, run
from vhdkit.chain.verbs.merge_parts import file_of_layer, opened
from vhdkit.chain.verbs.merge_recovery import finish as finish_merge
from vhdkit.held_folder import HeldFolder

_Choose: TypeAlias = Callable[[list[Night], Collection[int]], tuple[set[int], dict[int, tuple[str, ...]]]]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was done, or with a dry run would be. `finished` are the nights of an interrupted prune that was ended,
    `bases` the paths of shared bases that no night of any machine needed any more; a dry run does not look for them.
    `nights` are the manifests as they were before.
    """

    plan: PrunePlan
    finished: tuple[int, ...]
    dry_run: bool
    bases: tuple[str, ...] = ()
    nights: tuple[Manifest, ...] = ()


def prune(
    machine: MachineFolder,
    rules: KeepRules,
    zone: tzinfo,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Drop the nights that no rule keeps. Finishes an interrupted prune first.

    Raises InvalidArgument without rules, ImageInUse if the machine or one of its images is in use, DamagedRepository
    before anything damaged is merged, NoSpace, IoFailed.
    """

    def choose(nights: list[Night], leased: Collection[int]) -> tuple[set[int], dict[int, tuple[str, ...]]]:
        dated = dated_nights(machine, nights, leased)
        kept = reasons_to_keep(dated, rules, zone)
        return {one.number for one in dated if one.number not in kept}, kept

    return _changed(machine, "prune", choose, dry_run=dry_run, progress=progress)


def delete(
    machine: MachineFolder,
    number: int,
    *,
    newest: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Drop one night. The newest whole one is dropped only with `newest`; a protected or leased one never.

    Raises NotFound, InvalidArgument, and what `prune` raises.
    """

    def choose(nights: list[Night], leased: Collection[int]) -> tuple[set[int], dict[int, tuple[str, ...]]]:
        dated = dated_nights(machine, nights, leased)
        found = next((one for one in dated if one.number == number), None)
        if found is None:
            raise errors.NotFound(f"has no night {number} of {machine.name}", path=machine.repository.path)
        if found.is_protected:
            raise errors.InvalidArgument(
                f"night {number} is protected",
                path=machine.path,
                hint=f"end that first: vhdkit backup protect {errors.quoted(machine.repository.path)}"
                f" {errors.quoted(f'{machine.name}@{number}')} --off",
            )
        if found.is_leased:
            raise _is_read(machine, number)
        whole = [one.number for one in dated if one.is_whole]
        if whole[-1:] == [number] and not newest:
            raise errors.InvalidArgument(
                f"night {number} is the newest whole night of {machine.name}",
                path=machine.path,
                hint="if it is to be deleted all the same, add --newest",
            )
        return {number}, {}

    return _changed(machine, "delete", choose, dry_run=dry_run, progress=progress)


def finish(machine: MachineFolder, progress: Progress | None = None) -> tuple[int, ...]:
    """Finish an interrupted prune, if there is one; returns its nights. Call with the machine's lock held.

    Raises as `prune`.
    """
    journal = journal_or_rest(machine)
    nights = machine.nights()
    marked = [one.number for one in nights if one.manifest is not None and one.manifest.dropped]
    untouched = _untouched(machine, nights, _leased(machine))
    if journal is None and plan_prune(_manifests(nights), (), untouched=untouched).is_empty:
        return ()
    _refuse_unread(nights)
    begun = () if journal is None else journal.nights
    if journal is not None:
        _finish_step(machine, journal, progress)
        nights = machine.nights()
        drop = {one.night for one in _manifests(nights) if one.dropped or not one.protected} & set(begun)
        begun = tuple(number for number in begun if number in drop or all(one.number != number for one in nights))
        _carry_out(machine, nights, drop, untouched - drop, progress, also=journal.removals)
    else:
        _carry_out(machine, nights, set(), untouched, progress)
    return tuple(sorted({*begun, *marked}))


def finish_interrupted(machine: MachineFolder, *, is_held: bool = False, wanted: int | None = None) -> None:
    """Finish an interrupted prune, or the switch of an interrupted copy, as far as that is possible; what is in the
    way is left to the next one.

    For what reads nights or adds one; `is_held` says that the caller has the machine's lock. If the prune is about to
    drop the night `wanted`, it is left as it is: as long as that night exists, nothing was merged.
    """
    with contextlib.suppress(errors.VhdkitError):
        if machine.folder.exists(SWITCH_FILE):
            with contextlib.nullcontext() if is_held else machine.held("the rest of a copy", copying=True):
                finish_switch(machine)
        journal = journal_or_rest(machine)
        if journal is not None and wanted not in journal.nights:
            with contextlib.nullcontext() if is_held else machine.held("the rest of a prune"):
                finish(machine)


def dated_nights(machine: MachineFolder, nights: list[Night], leased: Collection[int]) -> list[DatedNight]:
    """The nights as the rules see them; one with a manifest that cannot be read is left out, and so stays."""
    whole = {one.number for one in known_results(machine, nights) if one.is_whole}
    return [
        DatedNight(one.number, one.manifest.taken, one.number in whole, one.manifest.protected, one.number in leased)
        for one in nights
        if one.manifest is not None and not one.manifest.dropped
    ]


# -- carrying out ---------------------------------------------------------------------------------------------------


def _changed(
    machine: MachineFolder, doing: str, choose: _Choose, *, dry_run: bool, progress: Progress | None
) -> Pruned:
    with contextlib.nullcontext() if dry_run else machine.held(doing):
        finished = () if dry_run else finish(machine, progress)
        nights, leased = machine.nights(), _leased(machine)
        drop, kept = choose(nights, leased)
        untouched = _untouched(machine, nights, leased) - drop
        if drop:
            _refuse_unread(nights)
        if dry_run:
            plan = plan_prune(_manifests(nights), drop, kept=kept, untouched=untouched)
            return Pruned(plan, finished, True, nights=tuple(_manifests(nights)))
        plan = _carry_out(machine, nights, drop, untouched, progress, kept=kept)
        bases: list[str] = []
        with contextlib.suppress(DamagedRepository):  # of another machine, which needs some of them, perhaps
            bases = remove_unused_bases(machine.repository)
        return Pruned(plan, finished, False, tuple(bases), tuple(_manifests(nights)))


def _refuse_unread(nights: list[Night]) -> None:
    """Raise DamagedRepository if a manifest cannot be read: it is unknown which images its night needs."""
    problem = next((one.problem for one in nights if one.problem is not None), None)
    if problem is not None:
        number = next(one.number for one in nights if one.problem is problem)
        raise DamagedRepository(
            f"the manifest of night {number} cannot be read, so it is unknown which images it needs:"
            f" {problem.problem}",
            path=problem.path,
            hint="restore that file from a copy of the repository, or remove it if the night is lost",
        )


def _carry_out(
    machine: MachineFolder,
    nights: list[Night],
    drop: set[int],
    untouched: Collection[int],
    progress: Progress | None,
    *,
    kept: dict[int, tuple[str, ...]] | None = None,
    also: tuple[ImagePlace, ...] = (),
) -> PrunePlan:
    plan = plan_prune(_manifests(nights), drop, kept=kept, untouched=untouched)
    stay = [one for one in _manifests(nights) if one.night in untouched or not (one.dropped or one.night in drop)]
    needed = _needed(_manifests(nights), stay)
    also = tuple(place for place in also if place not in needed)
    removals = tuple(dict.fromkeys([*(one.place for one in plan.removals), *also]))
    if plan.is_empty and not also:
        _forget(machine, nights)
        remove_journal(machine)
        return plan
    for merging in plan.mergings:
        _refuse_second_names(machine, merging)
    journal = PruneJournal(tuple(sorted(drop)), removals, None)
    with contextlib.suppress(*(() if plan.mergings else (errors.NoSpace,))):
        write_journal(machine, journal)
    for number in sorted(_leased(machine).keys() - set(untouched)):
        remove_journal(machine)
        raise _is_read(machine, number)
    _mark(machine, nights, drop, set(removals))
    _remove_images(machine, removals)
    if plan.mergings:  # records of what is gone would be taken for children of a target
        _forget(machine, machine.nights())
    for merging in plan.mergings:
        _merge(machine, replace(journal, merging=merging), progress)
    _forget(machine, machine.nights())
    remove_journal(machine)
    return plan


def _refuse_second_names(machine: MachineFolder, merging: ImageMerge) -> None:
    """Raise InvalidArgument if a file that the merge writes to has a second name, perhaps outside the repository."""
    standing = Images(_manifests(machine.nights())).children()
    for place in (merging.target, *merging.gone, *standing.get(merging.target, ()), *standing.get(merging.leaf, ())):
        with contextlib.suppress(errors.NotFound), machine.folder_of(place) as folder:
            folder.sweep()
            with folder.file(place.name) as store:
                if os.fstat(store.fileno()).st_nlink > 1:
                    raise errors.InvalidArgument(
                        "has a second name (a hard link), which a merge would change, too",
                        path=store.name,
                        hint="remove that name, or replace the file by a copy of it (cp -a)",
                    )


def _mark(machine: MachineFolder, nights: list[Night], drop: set[int], gone: set[ImagePlace]) -> None:
    """Mark the manifests of the dropped nights, or remove those that describe nothing which is needed.

    The newest goes first: if this is interrupted, a night that was to go later can still be read.
    """
    live = {disk.image for one in _manifests(nights) if one.night not in drop for disk in one.disks}
    for manifest in reversed(_manifests(nights)):
        if manifest.night not in drop or manifest.dropped:
            continue
        needed = [disk for disk in manifest.disks if disk.image not in gone and disk.image not in live]
        if needed:
            machine.write_manifest(replace(manifest, dropped=True, disks=tuple(needed), files=()), replace=True)
        else:
            machine.remove_manifest(manifest.night)


def _needed(manifests: list[Manifest], nights: list[Manifest]) -> set[ImagePlace]:
    """The images that these nights, among all manifests, stand on; a night can be younger than the journal."""
    found: set[ImagePlace] = set()
    for one in Images(manifests).needed(nights):
        found |= {one.place} if one.parent is None else {one.place, one.parent}
    return found


def _remove_images(machine: MachineFolder, places: tuple[ImagePlace, ...]) -> None:
    """Remove images and what belongs to them, unless a night that is not dropped needs them."""
    manifests = _manifests(machine.nights())
    needed = _needed(manifests, [one for one in manifests if not one.dropped])
    for place in places:
        if place in needed or place.disk_id is None:
            continue
        with contextlib.suppress(errors.NotFound), machine.images(place.disk_id) as folder:
            for name in (place.name, place.sums_name, *sidecars(folder, place.name)):
                folder.remove(name)
            folder.sync()


def _merge(machine: MachineFolder, journal: PruneJournal, progress: Progress | None) -> None:
    """Merge, with the journal naming it first."""
    merging = journal.merging
    assert merging is not None and merging.target.disk_id is not None
    write_journal(machine, journal)
    with machine.images(merging.target.disk_id) as folder:
        renewal = Renewal(machine, folder, merging)
        leaf, options = os.path.join(folder.path, merging.leaf.name), _options(machine, folder)
        with opened(leaf, options) as layers:
            names = [os.path.basename(file_of_layer(layer).name) for layer in layers]
            index = names.index(merging.target.name) if merging.target.name in names else 0
            between = [place.name for place in merging.gone]
            if names[:index] != between:
                raise DamagedRepository("does not stand on the images that its record names", path=leaf)
            plan = plan_in_place(layers, index, relink_children=True)
            with prepare(plan, options) as prepared:
                renewal.before(plan)
                run(prepared, progress, renewal.after)
        _remove_tables(folder, merging)


def _finish_step(machine: MachineFolder, journal: PruneJournal, progress: Progress | None) -> None:
    """Finish the merging that the journal names, if it had begun; it is planned anew if it had not."""
    merging = journal.merging
    if merging is None or merging.target.disk_id is None:
        return
    with machine.images(merging.target.disk_id) as folder:
        renewal = Renewal(machine, folder, merging)
        target, options = os.path.join(folder.path, merging.target.name), _options(machine, folder)
        intent = intent_of(target, (folder.path,))
        _refuse_if_read(machine, merging)
        if intent is not None:
            finish_merge(intent, options, progress, before_removal=renewal.after)
        elif not folder.exists(merging.leaf.name) and folder.exists(merging.target.name):
            if _names_leaf(machine, merging):  # another program has finished the merge
                renewal.after(None)
        else:
            return
        _remove_tables(folder, merging)


def _refuse_if_read(machine: MachineFolder, merging: ImageMerge) -> None:
    """Raise ImageInUse if something reads a night that needs one of these images."""
    manifests = _manifests(machine.nights())
    images, changing = Images(manifests), {merging.target, *merging.gone}
    for number in sorted(_leased(machine)):
        read = images.needed(one for one in manifests if one.night == number)
        if any(one.place in changing for one in read):
            raise _is_read(machine, number)


def _names_leaf(machine: MachineFolder, merging: ImageMerge) -> bool:
    return any(disk.image == merging.leaf for one in _manifests(machine.nights()) for disk in one.disks)


def _remove_tables(folder: HeldFolder, merging: ImageMerge) -> None:
    for place in merging.gone:
        folder.remove(place.sums_name)
    folder.sync()


def _options(machine: MachineFolder, folder: HeldFolder) -> OpenOptions:
    folders = [folder.path]
    with contextlib.suppress(errors.NotFound), machine.repository.bases() as bases:
        folders.append(bases.path)
    return OpenOptions(parent_dirs=folders)


def _forget(machine: MachineFolder, nights: list[Night]) -> None:
    """Remove the manifests of dropped nights that describe nothing any more, other files, tables without an image."""
    manifests = _manifests(nights)
    live = {disk.image for one in manifests if not one.dropped for disk in one.disks}
    for manifest in manifests:
        if manifest.dropped:
            needed = [disk for disk in manifest.disks if disk.image not in live and _exists(machine, disk.image)]
            if not needed:
                machine.remove_manifest(manifest.night)
            elif len(needed) < len(manifest.disks):
                machine.write_manifest(manifest.with_disks(needed), replace=True)
    _remove_other_files(machine)
    machine.sweep()
    for disk_id in machine.disk_ids():
        with machine.images(disk_id) as folder:
            folder.sweep()
            names = set(folder.names(MAX_FILES))
            for name in names:
                if name.endswith(SUMS_SUFFIX) and name.removesuffix(SUMS_SUFFIX) not in names:
                    folder.remove(name)
            folder.sync()


def _remove_other_files(machine: MachineFolder) -> None:
    """Remove the folders of other files whose night was dropped."""
    nights = machine.nights()
    live = {night_word(one.number) for one in nights if one.manifest is None or not one.manifest.dropped}
    with contextlib.suppress(errors.NotFound), machine.folder.folder(META) as meta:
        for name in meta.names(MAX_FILES):
            if name not in live:
                remove_whole(meta, name)


def _exists(machine: MachineFolder, place: ImagePlace) -> bool:
    try:
        with machine.folder_of(place) as folder:
            return folder.exists(place.name)
    except errors.NotFound:
        return False


def _manifests(nights: list[Night]) -> list[Manifest]:
    return [one.manifest for one in nights if one.manifest is not None]


def _untouched(machine: MachineFolder, nights: list[Night], leased: Collection[int]) -> set[int]:
    """The nights whose images, and all below them, stay as they are: something reads them, or they are damaged."""
    return {*leased, *(one.number for one in known_results(machine, nights) if not one.is_whole)}


def _leased(machine: MachineFolder) -> dict[int, str]:
    """The nights that something reads, and what. Leases of dead processes are removed."""
    found = leases(machine.repository.root)
    with contextlib.suppress(errors.ReadOnly, errors.AccessDenied):
        drop_dead(machine.repository.root, found)
    return {number: one.purpose for number, one in leased_nights(found, machine.id).items()}


def _is_read(machine: MachineFolder, number: int) -> errors.ImageInUse:
    lease = leased_nights(leases(machine.repository.root), machine.id).get(number)
    what = "another program" if lease is None else errors.printable(lease.purpose)
    hint = "wait until it has ended"
    if lease is not None:
        hint += f"; if it no longer runs, release the night: --release {lease.id}"
    return errors.ImageInUse(f"night {number} is read by {what}", path=machine.path, hint=hint)
