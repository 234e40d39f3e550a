# SPDX-License-Identifier: Apache-2.0
"""The records of a machine after images were merged: new sums for what has changed, and manifests with the result.

Decides which parts of a file a merge cannot have changed, and in which order tables and manifests are replaced. Must
not know why images are merged.

A merge changes the blocks that a source owns, and structures; every other block of the target, and every block of the
children that are pointed to it, has the bytes that it had. So only the rest is read (`changed_ranges`), and before the
merge the rest is compared with the old sums: damage must not get new sums that call it right.

Everything here can be repeated, and is, after an interruption: `after` runs while all sources still exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors
from vhdkit.backup import sums
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import ImageRecord, Images
from vhdkit.backup.manifest import DiskRecord, Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.prune import ImageMerge
from vhdkit.backup.repository import MachineFolder
from vhdkit.chain.names.parents import linkage_id_of
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.merge_in_place import InPlacePlan
from vhdkit.formats.probe import open_layer
from vhdkit.held_folder import HeldFolder
from vhdkit.image import Layer
from vhdkit.store import FileStore

_MOST_GAP_BYTES = 64 * 1024  # between two blocks that lie next to each other: a bitmap, and the way to a page


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

    def before(self, plan: InPlacePlan) -> None:
        """Compare what will be merged, or gets new sums, with its sums. Raises DamagedRepository."""
        images = self._images()
        merging = self._merging
        for place in merging.gone:
            self._require_sums(images.records[place], None)
        self._require_sums(images.records[merging.target], _touched(plan))
        for place in self._children(images):
            self._require_sums(images.records[place], ())

    def after(self, plan: InPlacePlan | None) -> None:
        """Write new tables and manifests for the target and the children that were pointed to it.

        Without a plan, which is unknown when another program has finished the merge, all of the target is read.
        """
        images, merging = self._images(), self._merging
        target = self._renewed(
            images.records.get(merging.target), merging.target, None if plan is None else _touched(plan)
        )
        now = {merging.target: target}
        for place in self._children(images):
            now[place] = self._renewed(images.records[place], place, ())
        self._write_manifests(images, now)

    # -- sums -----------------------------------------------------------------------------------------------------

    def _require_sums(self, record: ImageRecord, touched: Sequence[int] | NDArray[np.int64] | None) -> None:
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

    def _renewed(
        self, record: ImageRecord | None, place: ImagePlace, touched: Sequence[int] | NDArray[np.int64] | None
    ) -> _Now:
        with self._folder.file(place.name) as store:
            with self._folder.new_file(place.sums_name, replace=True) as table:
                root = self._table(record, store, table, touched)
            return _Now(linkage_id_of(store).hex(), store.size(), store.allocated_bytes(), root)

    def _table(
        self,
        record: ImageRecord | None,
        store: FileStore,
        table: FileStore,
        touched: Sequence[int] | NDArray[np.int64] | None,
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


def _touched(plan: InPlacePlan) -> NDArray[np.int64]:
    """The blocks of the target in which a source owns anything."""
    return plan.moves.units


def changed_ranges(store: FileStore, touched: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, int]]:
    """The parts of an image's file that may change while only these blocks, and structures, are written."""
    layer = open_layer(pending.view(store))
    size = store.size()
    if not layer.block_size_bytes:
        return [(0, size)]
    changed, at = [], 0
    for begin, end in _joined_blocks(layer, touched):
        changed.append((at, begin - at))
        at = end
    return sums.joined([*changed, (at, size - at)])


def _joined_blocks(layer: Layer, touched: Sequence[int] | NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(begin, end) in the file of runs of blocks that stay as they are, with the gaps between neighbours."""
    stays = layer.allocated_blocks().copy()
    indexes = np.asarray(touched, dtype=np.int64)
    changing = np.zeros(len(stays), dtype=np.bool_)
    changing[indexes[indexes < len(stays)]] = True
    places = [(layer.block_offset(int(one)), bool(changing[one])) for one in np.flatnonzero(stays)]
    begin = end = -1
    for offset, is_changing in sorted(place for place in places if place[0] >= 0):
        if is_changing:
            if end > begin:
                yield begin, end
            begin = end = -1
        elif end > begin and 0 <= offset - end <= _MOST_GAP_BYTES:
            end = offset + layer.block_size_bytes
        else:
            if end > begin:
                yield begin, end
            begin, end = offset, offset + layer.block_size_bytes
    if end > begin:
        yield begin, min(end, layer.store.size())


def sidecars(folder: HeldFolder, name: str) -> list[str]:
    """The names of the records beside an image."""
    from vhdkit.folder import sidecars_of

    return [os.path.basename(one) for one in sidecars_of(os.path.join(folder.path, name))]
