# SPDX-License-Identifier: Apache-2.0
"""Plans of prunes: for any tree of nights, what is kept can be read afterwards, and nothing is copied needlessly."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.vhdkit.backup.repositories import disk_record, manifest
from vhdkit.backup.graph import Images
from vhdkit.backup.manifest import Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.prune import ImageMerge, PrunePlan, plan_prune


def place(number: int) -> ImagePlace:
    """The image of a night."""
    return ImagePlace("disk-0", f"{number:05d}.avhd")


def night(number: int, image: int, parent: int | None, **more: bool) -> Manifest:
    """A night with one disk, whose image was made in the night `image`."""
    on = None if parent is None else place(parent)
    record = disk_record(image=place(image), image_id=f"{image:032x}", parent_image=on, data_bytes=100)
    return replace(manifest(number, disks=(record,)), **more)  # type: ignore[arg-type]


def line(count: int) -> list[Manifest]:
    """So many nights, one on the other."""
    return [night(number, number, number - 1 or None) for number in range(1, count + 1)]


@st.composite
def trees(draw: st.DrawFn) -> list[Manifest]:
    """Nights on earlier ones, some unchanged, some full, some dropped earlier."""
    found: list[Manifest] = []
    for number in range(1, draw(st.integers(1, 12)) + 1):
        on = draw(st.none() | st.sampled_from(found)) if found else None
        if on is None:
            found.append(night(number, number, None))
        elif draw(st.integers(0, 3)) == 0:
            found.append(replace(manifest(number, disks=on.disks)))
        else:
            image = int(on.disks[0].image.name[:5])
            found.append(night(number, number, image, dropped=draw(st.integers(0, 4)) == 0))
    return found


def carried_out(manifests: list[Manifest], plan: PrunePlan) -> dict[ImagePlace, list[int]]:
    """The images afterwards, each as the list of the nights' data that it holds together with those below it."""
    images = Images(manifests)
    content = {one: [int(record.place.name[:5]) for record in images.chain(one)] for one in images.records}
    parents = {one: record.parent for one, record in images.records.items()}
    for removal in plan.removals:
        assert removal.place not in parents.values(), "something stands on it"
        del parents[removal.place], content[removal.place]
    for merging in plan.mergings:
        chain = [*merging.gone, merging.target]
        for above, below in pairwise(chain):
            assert parents[above] == below
            assert [one for one, on in parents.items() if on == below] == [above], "something else stands on it"
        content[merging.target] = content[merging.leaf]
        for child, on in parents.items():
            if on == merging.leaf:
                parents[child] = merging.target
        for gone in merging.gone:
            del parents[gone], content[gone]
    return content


@given(trees(), st.data())
def test_every_kept_night_can_be_read(manifests: list[Manifest], data: st.DataObject) -> None:
    """After any prune of any tree each night that was kept reads as before, wherever its content is now; each image
    that is left is needed; leased nights' images, and all below them, are untouched."""
    numbers = [one.night for one in manifests]
    drop = set(data.draw(st.lists(st.sampled_from(numbers), unique=True)))
    leased = set(data.draw(st.lists(st.sampled_from(numbers), unique=True, max_size=1))) - drop
    plan = plan_prune(manifests, drop, untouched=leased)
    images, content = Images(manifests), carried_out(manifests, plan)
    moved = {one.leaf: one.target for one in plan.mergings}
    live = [one for one in manifests if one.night not in drop and not one.dropped]
    for one in live:
        image = one.disks[0].image
        assert content[moved.get(image, image)] == [int(record.place.name[:5]) for record in images.chain(image)]
    needed = {moved.get(one.disks[0].image, one.disks[0].image) for one in live}
    assert set(content) == needed | set(plan.hidden) | set(plan.deferred) | {one.target for one in plan.mergings} | (
        set(plan.hidden) & set(content)
    )
    for one in manifests:
        if one.night in leased:
            below = {record.place for record in images.chain(one.disks[0].image)}
            assert not below & {place for merging in plan.mergings for place in (*merging.gone, merging.target)}
            assert not below & {removal.place for removal in plan.removals}


@given(trees(), st.data())
def test_a_hidden_image_has_several_children(manifests: list[Manifest], data: st.DataObject) -> None:
    """Without leases an image that no night needs stays only where at least two others stand on it."""
    drop = set(data.draw(st.lists(st.sampled_from([one.night for one in manifests]), unique=True)))
    plan = plan_prune(manifests, drop)
    children = Images(manifests).children()
    gone = {one.place for one in plan.removals}
    assert not plan.deferred
    assert all(len(set(children[one]) - gone) >= 2 for one in plan.hidden)


def test_the_oldest_go_down() -> None:
    """When the oldest nights go, the first kept one and all between are merged into the oldest image."""
    plan = plan_prune(line(4), {1, 2})
    assert plan.mergings == (ImageMerge(place(1), (place(2),), place(3)),) and not plan.removals
    assert plan.dropped == (1, 2) and plan.copied_bytes == 200


def test_the_newest_are_removed() -> None:
    """When the newest nights go, their images are removed, the newest first, and nothing is copied."""
    plan = plan_prune(line(4), {3, 4})
    assert [one.place for one in plan.removals] == [place(4), place(3)] and not plan.mergings
    assert (plan.copied_bytes, plan.freed_bytes) == (0, 200)


def test_the_middle_is_merged() -> None:
    """A night in the middle is merged with the one above it, wherever in the chain that is."""
    assert plan_prune(line(5), {3}).mergings == (ImageMerge(place(3), (), place(4)),)


def test_unchanged_nights_share_an_image() -> None:
    """An image stays as long as one of the nights that name it does."""
    nights = [night(1, 1, None), night(2, 2, 1), night(3, 2, 1)]
    assert plan_prune(nights, {2}).mergings == () == plan_prune(nights, {2}).removals
    assert [one.place for one in plan_prune(nights, {2, 3}).removals] == [place(2)]


def test_a_branch_keeps_its_image() -> None:
    """The image on which two kept nights stand stays, hidden; when one of them goes, it is merged with the other."""
    nights = [night(1, 1, None), night(2, 2, 1), night(3, 3, 1)]
    assert plan_prune(nights, {1}).hidden == (place(1),) and plan_prune(nights, {1}).mergings == ()
    later = [replace(nights[0], dropped=True), *nights[1:]]
    plan = plan_prune(later, {2})
    assert [one.place for one in plan.removals] == [place(2)]
    assert plan.mergings == (ImageMerge(place(1), (), place(3)),)


def test_shared_bases_stay() -> None:
    """A shared base is neither merged nor removed, whatever stands on it."""
    base = ImagePlace(None, "base.vhd")
    record = disk_record(image=place(1), parent_image=base)
    plan = plan_prune([manifest(1, disks=(record,))], {1})
    assert [one.place for one in plan.removals] == [place(1)] and plan.hidden == ()


def test_nothing_to_do() -> None:
    """Dropping nothing from a repository in order changes nothing."""
    assert plan_prune(line(3), set()).is_empty
