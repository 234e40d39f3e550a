# SPDX-License-Identifier: Apache-2.0
"""The records of a machine after images were merged: new sums for what has changed, and manifests with the result.

Decides in which order tables and manifests are replaced. Must not know why images are merged.

Only the parts of a file that the merge can change are read (`changes`): they are compared with the old sums before the
merge, because damage must not get new sums that call it right, and get new sums after it.

Everything here can be repeated, and is, after an interruption: `after` runs while all sources still exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vhdkit import errors
from vhdkit.backup import sums
from vhdkit.backup.changes import NOTHING, Touched, changed_ranges, touched_blocks, touched_sectors
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import ImageRecord, Images
from vhdkit.backup.manifest import DiskRecord, Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.prune import ImageMerge
from vhdkit.backup.repository import MachineFolder
from vhdkit.chain.names.parents import linkage_id_of
from vhdkit.chain.verbs.merge_in_place import InPlacePlan
from vhdkit.held_folder import HeldFolder
from vhdkit.store import FileStore


@dataclass(frozen=True, slots=True)
class _Now:
    """What a file is after the merge."""

    image_id: str
    file_size_bytes: int
    data_bytes: int
    sums_root: str


class Renewal:
    """The work on records around one merge. `folder` is that of the disk's images."""

    def __init__(self, machine: MachineFolder, folder: HeldFolder, merging: ImageMerge) -> None:
        self._machine, self._folder, self._merging = machine, folder, merging
        self._touched: Touched | None = None  # unknown after an interruption

    def before(self, plan: InPlacePlan) -> None:
        """Compare what will be merged, or gets new sums, with its sums. Raises DamagedRepository."""
        images = self._images()
        merging = self._merging
        for place in merging.gone:
            self._require_sums(images.records[place], None)
        self._touched = touched_sectors(plan)
        self._require_sums(images.records[merging.target], self._touched)
        for place in self._children(images):
            self._require_sums(images.records[place], NOTHING)

    def after(self, plan: InPlacePlan | None) -> None:
        """Write new tables and manifests for the target and the children that were pointed to it.

        Without a plan, which is unknown when another program has finished the merge, all of the target is read.
        """
        images, merging = self._images(), self._merging
        touched = self._touched or (None if plan is None else touched_blocks(plan))
        target = self._renewed(images.records.get(merging.target), merging.target, touched)
        now = {merging.target: target}
        for place in self._children(images):
            now[place] = self._renewed(images.records[place], place, NOTHING)
        self._write_manifests(images, now)

    # -- sums -----------------------------------------------------------------------------------------------------

    def _require_sums(self, record: ImageRecord, touched: Touched | None) -> None:
        """Compare the file, or with `touched` what is outside the other blocks, with its table."""
        with self._folder.file(record.place.name) as store, self._folder.file(record.place.sums_name) as table:
            sums.require_same_size(store, record.file_size_bytes)
            sums.check_table(table, record.sums_root, record.file_size_bytes)
            ranges = None if touched is None else changed_ranges(store, touched)
            for one in sums.differing(store, table, ranges):
                raise DamagedRepository(
                    f"is damaged at byte {one.offset_bytes}: it is not merged",
                    path=store.name,
                    hint="verify the repository, and delete the nights that the damage reaches",
                )

    def _renewed(self, record: ImageRecord | None, place: ImagePlace, touched: Touched | None) -> _Now:
        with self._folder.file(place.name) as store:
            with self._folder.new_file(place.sums_name, replace=True) as table:
                root = self._table(record, store, table, touched)
            return _Now(linkage_id_of(store).hex(), store.size(), store.allocated_bytes(), root)

    def _table(
        self,
        record: ImageRecord | None,
        store: FileStore,
        table: FileStore,
        touched: Touched | None,
    ) -> str:
        if record is None or touched is None:
            return sums.make_table(store, table)
        try:
            with self._folder.file(record.place.sums_name) as old:
                sums.check_table(old, record.sums_root, record.file_size_bytes)
                return sums.renewed_table(store, old, table, changed_ranges(store, touched))
        except (DamagedRepository, errors.NotFound):  # replaced before an interruption
            table.truncate(0)
            return sums.make_table(store, table)

    # -- manifests ------------------------------------------------------------------------------------------------

    def _images(self) -> Images:
        nights = self._machine.nights()
        return Images(one.manifest for one in nights if one.manifest is not None)

    def _children(self, images: Images) -> list[ImagePlace]:
        """The images that stand on the result: those recorded on the leaf, or on the target and not merged."""
        merged = {self._merging.target, *self._merging.gone}
        standing = images.children()
        on = [*standing.get(self._merging.leaf, ()), *standing.get(self._merging.target, ())]
        return [place for place in dict.fromkeys(on) if place not in merged]

    def _write_manifests(self, images: Images, now: dict[ImagePlace, _Now]) -> None:
        """First those of the nights that the result holds and of its children, then the dropped ones below it."""
        merging = self._merging
        on = next((images.records[one].parent for one in (merging.target,) if one in images.records), None)
        left = []
        for manifest in images.manifests:
            disks = list(_renewed_disks(manifest, merging, now, on))
            if len(disks) < len(manifest.disks):
                left.append(manifest.with_disks(disks))
            elif tuple(disks) != manifest.disks:
                self._machine.write_manifest(manifest.with_disks(disks), replace=True)
        for manifest in left:
            self._machine.write_manifest(manifest, replace=True)


def _renewed_disks(
    manifest: Manifest, merging: ImageMerge, now: dict[ImagePlace, _Now], on: ImagePlace | None
) -> Iterator[DiskRecord]:
    """The records of a manifest's disks after the merge."""
    target = now[merging.target]
    for disk in manifest.disks:
        if disk.image == merging.leaf:
            yield _at(replace(disk, image=merging.target, parent_image=on), target)
        elif disk.image in merging.between:
            continue  # only of dropped nights: its content is gone
        elif disk.image == merging.target:
            if not manifest.dropped or disk.sums_root == target.sums_root:
                yield _at(disk, target)
        elif disk.image in now:
            yield _at(replace(disk, parent_image=merging.target), now[disk.image])
        else:
            yield disk


def _at(disk: DiskRecord, now: _Now) -> DiskRecord:
    return replace(
        disk,
        image_id=now.image_id,
        file_size_bytes=now.file_size_bytes,
        data_bytes=now.data_bytes,
        sums_root=now.sums_root,
    )


def sidecars(folder: HeldFolder, name: str) -> list[str]:
    """The names of the records beside an image."""
    from vhdkit.folder import sidecars_of

    return [os.path.basename(one) for one in sidecars_of(os.path.join(folder.path, name))]
