# SPDX-License-Identifier: Apache-2.0
"""What a copy of a machine's nights lacks, one step at a time. Pure.

Decides what a step changes, in which order nights are added, and when two repositories have nights that contradict
each other. Must not know files.

First what the copy has becomes what the source has: nights that were dropped from the source go, images that a prune
has rewritten are rewritten, manifests follow. Then each missing night is added, oldest first, with the images of its
chain and the manifests that describe them. `plan_step` is called again after each step, until nothing is missing.

A night is the same on both sides if its id is. A night that only the copy has was dropped from the source, if the
source knows the state of the copy (`copies`) and has used its number. Otherwise it is refused: it may exist nowhere
else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from vhdkit import errors
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import ImageRecord, Images
from vhdkit.backup.manifest import Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.repository import Night

_PARTS = 32  # of the missing nights, one is added at once: each step reads all manifests


@dataclass(frozen=True, slots=True)
class CopyStep:
    """One step. `new` are images to copy, each after those below it; `rewritten` are images that the copy has with
    other content: as they are and as they become. `write` are manifests, each after those that it needs; `gone` are
    images that no night of the copy needs afterwards.
    """

    write: tuple[Manifest, ...] = ()
    remove: tuple[int, ...] = ()
    new: tuple[ImageRecord, ...] = ()
    rewritten: tuple[tuple[ImageRecord, ImageRecord], ...] = ()
    gone: tuple[ImagePlace, ...] = ()
    adds_only: bool = True

    @property
    def nights(self) -> tuple[int, ...]:
        """The nights that can be restored, among those that are written."""
        return tuple(one.night for one in self.write if not one.dropped)


def plan_step(
    source: Sequence[Night],
    other: Sequence[Night],
    *,
    highest: int,
    knows: bool,
    skip: Collection[int] = (),
) -> CopyStep | None:
    """The next step that makes `other` a copy of `source`, both as they are now; None if there is none.

    `highest` is the last number that the source has used, `knows` whether it knows the state of the copy. Nights in
    `skip` are not added. Raises InvalidArgument where the copy has nights that must not be lost, DamagedRepository for
    manifests of the source that contradict each other.
    """
    require_same_line(source, other, highest=highest, knows=knows)
    return _repeated(source, other) or _added(source, other, skip)


def require_same_line(source: Sequence[Night], other: Sequence[Night], *, highest: int, knows: bool) -> None:
    """Raise InvalidArgument unless every night of the copy is one of the source's, or was dropped from it."""
    ours = {one.number: one for one in source}
    newest = max((highest, *ours))
    only = [one for one in other if one.number not in ours and (one.manifest is None or not one.manifest.dropped)]
    for night in other:
        known = ours.get(night.number)
        if known is None or known.manifest is None or night.manifest is None:
            continue
        if known.manifest.id != night.manifest.id:
            raise _contradiction(f"night {night.number} is another one than in the source: both were written to")
    for night in only:
        if night.number > newest:
            raise _contradiction(
                f"it has night {night.number}, and the source has come to night {newest}: the source is older than the"
                " copy"
            )
        if not knows:
            raise _contradiction(
                f"it has night {night.number}, and the source does not, nor does it know the copy's present state:"
                " another source or a later state of this one wrote it, or this one could not record it"
            )
    if only and not any(_is_live(one) for one in source):
        raise _contradiction("it has nights, and the source has none that can be read")


def _contradiction(problem: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"is not overwritten: {problem}",
        hint="copy to a new folder; if the source is lost: vhdkit backup promote COPY",
    )


def _is_live(night: Night) -> bool:
    return night.manifest is not None and not night.manifest.dropped


def _repeated(source: Sequence[Night], other: Sequence[Night]) -> CopyStep | None:
    """What makes the nights that the copy has as they are in the source."""
    ours = {one.number: one.manifest for one in source}
    theirs = {one.number: one.manifest for one in other}
    remove = [number for number in theirs if number not in ours]
    changed = [
        manifest
        for number, manifest in ours.items()
        if manifest is not None and number in theirs and theirs[number] != manifest
    ]
    if not changed and not remove:
        return None
    needed = _with_needed(changed, [one for one in ours.values() if one is not None])
    write = [one for one in needed if theirs.get(one.night) != one]
    wanted = {number: one for number, one in theirs.items() if number not in remove}
    wanted |= {one.night: one for one in write}
    old = Images(one for one in theirs.values() if one is not None)
    new = Images(one for one in wanted.values() if one is not None)
    is_certain = all(one is not None for one in wanted.values())  # else it is unknown what some night needs
    return CopyStep(
        write=tuple(write),
        remove=tuple(sorted(remove)),
        new=tuple(one for one in _sorted(new, write) if one.place not in old.records),
        rewritten=tuple(
            (old.records[one.place], one)
            for one in _sorted(new, write)
            if one.place in old.records and old.records[one.place].sums_root != one.sums_root
        ),
        gone=tuple(
            sorted(one for one in old.records if is_certain and one not in new.records and one.disk_id is not None)
        ),
        adds_only=False,
    )


def _added(source: Sequence[Night], other: Sequence[Night], skip: Collection[int]) -> CopyStep | None:
    """What adds the oldest nights that the copy lacks: few at once, as they exist only when all are copied."""
    there = {one.number for one in other}
    ours = [one.manifest for one in source if one.manifest is not None]
    missing = [one for one in ours if one.night not in there and one.night not in skip and not one.dropped]
    if not missing:
        return None
    few = missing[: -(-len(missing) // _PARTS)]
    write = [one for one in _with_needed(few, ours) if one.night not in there]
    old = Images(one.manifest for one in other if one.manifest is not None)
    new = [one for one in _sorted(Images(ours), write) if one.place not in old.records]
    return CopyStep(write=tuple(write), new=tuple(new))


def _with_needed(manifests: Iterable[Manifest], known: Sequence[Manifest]) -> list[Manifest]:
    """These manifests, each after those that describe the images below its own. Raises DamagedRepository."""
    images = Images(known)
    describing: dict[ImagePlace, Manifest] = {}
    for one in known:
        for place in (disk.image for disk in one.disks):
            describing.setdefault(place, one)
    found: dict[int, Manifest] = {}
    waiting: set[int] = set()

    def add(manifest: Manifest) -> None:
        if manifest.night in found or manifest.night in waiting:
            return
        waiting.add(manifest.night)
        needed = [record for disk in manifest.disks for record in reversed(_chain(images, manifest, disk.image))]
        for record in needed:
            if record.place in describing:
                add(describing[record.place])
        found[manifest.night] = manifest

    for one in sorted(manifests, key=lambda manifest: manifest.night):
        add(one)
    return list(found.values())


def _chain(images: Images, manifest: Manifest, place: ImagePlace) -> tuple[ImageRecord, ...]:
    """The chain of an image; of a dropped night only what can be followed."""
    try:
        chain = images.chain(place)
    except DamagedRepository:
        if manifest.dropped:
            return ()
        raise
    if any(one.place in images.contradictory for one in chain) and not manifest.dropped:
        raise DamagedRepository(f"manifests contradict each other about the images of night {manifest.night}")
    return chain


def _sorted(images: Images, manifests: Sequence[Manifest]) -> list[ImageRecord]:
    """The images that these manifests name, each once, after those below it."""
    found = {one.place: one for one in images.needed(manifests)}
    for manifest in manifests:
        for base in manifest.bases:
            found.setdefault(base.image, images.records[base.image])
    return list(found.values())
