# SPDX-License-Identifier: Apache-2.0
"""The images of a machine, as its manifests describe them."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from tests.vhdkit.backup.repositories import disk_record, manifest
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.graph import Images
from vhdkit.backup.manifest import DiskRecord, Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH


def place(number: int) -> ImagePlace:
    """The image of a night."""
    return ImagePlace("disk-0", f"{number:05d}.avhd")


def record(number: int, parent: int | None, **more: str) -> DiskRecord:
    """The record of a night's image on that of another night."""
    on = None if parent is None else place(parent)
    return replace(disk_record(image=place(number), image_id=f"{number:032x}", parent_image=on), **more)  # type: ignore[arg-type]


def night(number: int, parent: int | None, **more: str) -> Manifest:
    """A night with one disk."""
    return manifest(number, disks=(record(number, parent, **more),))


def test_a_chain_is_leaf_first() -> None:
    """A chain is followed through the records of several nights, down to the image without a parent."""
    images = Images([night(1, None), night(2, 1), night(3, 2)])
    assert [one.place for one in images.chain(place(3))] == [place(3), place(2), place(1)]
    assert [one.place for one in images.needed(images.manifests[2:])] == [place(1), place(2), place(3)]
    assert images.children() == {place(1): [place(2)], place(2): [place(3)]}


def test_damage_reaches_the_nights_above() -> None:
    """A damaged image reaches the nights that stand on it, on its own branch, and no others."""
    nights = [night(1, None), night(2, 1), night(3, 2), night(4, 1), manifest(5, disks=(record(4, 1),))]
    images = Images(nights)
    reached = [one.night for one in nights if list(images.reached(one, {place(2): "is damaged"}))]
    assert reached == [2, 3]
    assert [one.night for one in nights if list(images.reached(one, {place(4): "x"}))] == [4, 5]


def test_loops_and_missing_images_are_found() -> None:
    """A chain that returns to itself, or needs an image that nothing describes, is damage of its night alone."""
    images = Images([night(1, 3), night(2, 1), night(3, 2), night(4, 9), night(5, 5), night(6, None)])
    for number, word in ((1, "loop"), (3, "loop"), (4, "no manifest describes"), (5, "loop")):
        with pytest.raises(DamagedRepository, match=word):
            images.chain(place(number))
        assert word in "".join(images.reached(images.manifests[number - 1], {}))
    assert list(images.reached(images.manifests[5], {})) == []
    assert {one.place for one in images.needed(images.manifests)} == {place(number) for number in range(1, 7)}


def test_contradictions_are_found() -> None:
    """Two manifests that describe one image in different ways make every night that needs it doubtful."""
    other = replace(night(2, None), disks=(record(1, None, sums_root="12" * 32),))
    images = Images([night(1, None), other, night(3, 1), night(4, None)])
    assert images.contradictory == {place(1)}
    assert [bool(list(images.reached(one, {}))) for one in images.manifests] == [True, True, True, False]


def test_depth_is_bounded() -> None:
    """A chain as deep as can be opened is followed, one image more is damage."""
    nights = [night(number, number - 1 or None) for number in range(1, MAX_CHAIN_DEPTH + 2)]
    images = Images(nights)
    assert len(images.chain(place(MAX_CHAIN_DEPTH))) == MAX_CHAIN_DEPTH
    with pytest.raises(DamagedRepository, match=f"more than {MAX_CHAIN_DEPTH}"):
        images.chain(place(MAX_CHAIN_DEPTH + 1))


def test_a_thousand_unpruned_nights_take_no_time() -> None:
    """A thousand nights in several chains, most of them unchanged, are examined within moments."""
    nights = [night(number, number - 1 if number % 200 != 1 else None) for number in range(1, 1001)]
    begin = time.process_time()
    images = Images(nights)
    assert len(images.needed(nights)) == 1000
    assert not any(list(images.reached(one, {})) for one in nights)
    assert time.process_time() - begin < 20
