# SPDX-License-Identifier: Apache-2.0
"""What a prune or a deletion does to the images of a machine, as a plan. Pure.

Decides which images are removed, which are merged into which, and which stay although no night names them any more.

    dropped  1 ◄── 2 ◄── 3 kept        2 and 3 are merged into 1, which then is night 3's image
             1 ◄── 2 kept
               ◄── 3 kept              1 stays, hidden, as long as two images stand on it
             2 kept ◄── 3              3 is removed

A dropped image that one other stands on is merged with it, into the lower of the two; so a prune costs what the
dropped nights changed, wherever in the chain they are, and never what the disk holds. Names of files mean nothing
afterwards. Images of nights that are being read or damaged, and all below them, are left to a later prune.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from vhdkit.backup.graph import Images
from vhdkit.backup.manifest import Manifest
from vhdkit.backup.names import ImagePlace


@dataclass(frozen=True, slots=True)
class Removal:
    """An image on which nothing stands and that no night needs."""

    place: ImagePlace


@dataclass(frozen=True, slots=True)
class ImageMerge:
    """`leaf`, and the images between it and `target`, leaf first, are merged into `target`."""

    target: ImagePlace
    between: tuple[ImagePlace, ...]
    leaf: ImagePlace

    @property
    def gone(self) -> tuple[ImagePlace, ...]:
        """The images whose files are removed by it, leaf first."""
        return (self.leaf, *self.between)


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """`kept` has the reasons for each night that stays. `hidden` are images that stay because several others stand on
    them, `deferred` those that stay because of `untouched` nights.

    `copied_bytes` is what the merges copy, at most; `freed_bytes` what the removed files take, less that.
    """

    kept: Mapping[int, tuple[str, ...]]
    dropped: tuple[int, ...]
    removals: tuple[Removal, ...]
    mergings: tuple[ImageMerge, ...]
    hidden: tuple[ImagePlace, ...]
    deferred: tuple[ImagePlace, ...]
    copied_bytes: int
    freed_bytes: int

    @property
    def is_empty(self) -> bool:
        """True if nothing changes."""
        return not self.dropped and not self.removals and not self.mergings


def plan_prune(
    manifests: Iterable[Manifest],
    drop: Collection[int],
    *,
    kept: Mapping[int, tuple[str, ...]] | None = None,
    untouched: Collection[int] = (),
) -> PrunePlan:
    """The plan for dropping these nights of a machine, and for what an earlier prune has left.

    `manifests` are all that can be read, also those of dropped nights. `untouched` are nights whose images, and
    all below them, stay as they are: something reads them, or they are damaged.
    """
    images = Images(manifests)
    live = [one for one in images.manifests if not one.dropped and one.night not in drop]
    wanted = {disk.image for one in live for disk in one.disks}
    still = _below(images, [one for one in images.manifests if one.night in untouched])
    standing = {place: set(above) for place, above in images.children().items()}
    own = [record.place for record in images.records.values() if record.place.disk_id is not None]
    removals = _removals(images, own, wanted, standing, still)
    gone = {one.place for one in removals}
    mergings, deferred = _mergings(images, [one for one in own if one not in gone], wanted, standing, still)
    merged = {place for one in mergings for place in (*one.gone, one.target)}
    sizes = {disk.image: disk.data_bytes for one in images.manifests for disk in one.disks}
    copied = sum(sizes.get(place, 0) for one in mergings for place in one.gone)
    return PrunePlan(
        kept=dict(kept or {}),
        dropped=tuple(sorted(one.night for one in images.manifests if one.night in drop and not one.dropped)),
        removals=tuple(removals),
        mergings=tuple(mergings),
        hidden=tuple(sorted(set(own) - wanted - gone - merged - set(deferred))),
        deferred=tuple(sorted(deferred)),
        copied_bytes=copied,
        freed_bytes=sum(sizes.get(place, 0) for place in gone),
    )


def _below(images: Images, manifests: Iterable[Manifest]) -> set[ImagePlace]:
    """The images of these nights and everything below them."""
    return {record.place for record in images.needed(manifests)}


def _removals(
    images: Images,
    own: Iterable[ImagePlace],
    wanted: set[ImagePlace],
    standing: dict[ImagePlace, set[ImagePlace]],
    untouched: set[ImagePlace],
) -> list[Removal]:
    """Images that nothing stands on, and then those that only such images stood on. Changes `standing`."""
    found = []
    todo = sorted((place for place in own if not standing.get(place)), reverse=True)
    while todo:
        place = todo.pop()
        if place in wanted or place in untouched:
            continue
        found.append(Removal(place))
        parent = images.records[place].parent
        if parent is not None and parent in standing:
            standing[parent].discard(place)
            if not standing[parent] and parent.disk_id is not None and parent in images.records:
                todo.append(parent)
    return found


def _mergings(
    images: Images,
    own: Iterable[ImagePlace],
    wanted: set[ImagePlace],
    standing: dict[ImagePlace, set[ImagePlace]],
    untouched: set[ImagePlace],
) -> tuple[list[ImageMerge], list[ImagePlace]]:
    """Each run of unwanted images with the image that stands on it, and the unwanted ones that leases protect."""
    found, deferred = [], []
    unwanted = {place for place in own if place not in wanted and len(standing.get(place, ())) == 1}
    for target in sorted(unwanted):
        parent = images.records[target].parent
        if parent in unwanted and target not in untouched and parent not in untouched:
            continue  # a part of the run that begins further down
        if target in untouched:
            deferred.append(target)
            continue
        run = [target]
        while run[-1] in unwanted:
            (above,) = standing[run[-1]]
            if above in untouched or above in run:
                break
            run.append(above)
        if len(run) > 1:
            found.append(ImageMerge(target, tuple(reversed(run[1:-1])), run[-1]))
        else:
            deferred.append(target)
    return found, deferred
