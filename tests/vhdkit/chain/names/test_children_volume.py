# SPDX-License-Identifier: Apache-2.0
"""Children of images on a volume that is not a file system: found by the same code, with the same results."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tests.harness.memory_volume import MemoryVolume
from tests.memory_images import image, reference, without_files
from vhdkit import formats
from vhdkit.chain.names import marks
from vhdkit.chain.names.children import children_of, find_children, mark_findings
from vhdkit.chain.names.marks import Mark
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import find_by_id, linkage_id_of
from vhdkit.chain.records import pending
from vhdkit.formats.undo import apply_change, encode, plan_change
from vhdkit.local_volume import LOCAL
from vhdkit.units import SECTOR_SIZE
from vhdkit.volume import Volume


def forest(rng: random.Random, volume: MemoryVolume, root: str) -> list[str]:
    """Images in several folders with parents among each other, some damaged, copied, or on a raw disk."""
    folders = [root, f"{root}/a", f"{root}/a/b", f"{root}/c"]
    places: list[str] = []
    for number in range(rng.randint(4, 9)):
        place = f"{rng.choice(folders)}/{number}.vhd"
        kind = rng.random()
        if kind < 0.2 or not places:
            image(volume, place)
        elif kind < 0.3:
            place = place.replace("vhd", "img")
            volume.add(place).pwrite(0, rng.randbytes(SECTOR_SIZE))
        elif kind < 0.4:
            volume.add(place, volume.files[rng.choice(places)].copy())
        else:
            image(volume, place, rng.choice(places))
        places.append(place)
    for damaged in rng.sample(places, rng.randrange(2)):
        volume.files[damaged].pwrite(volume.files[damaged].size() - SECTOR_SIZE, bytes(SECTOR_SIZE))
    return places


@pytest.mark.parametrize("seed", range(16))
def test_children_are_those_that_the_file_system_has(tmp_path: Path, seed: int) -> None:
    """The children of an image, and the files with an id, are the same on both volumes."""
    rng, volume, root = random.Random(seed), MemoryVolume(), os.path.realpath(tmp_path)
    places = forest(rng, volume, root)
    options = OpenOptions(
        parent_dirs=rng.sample([root, f"{root}/a", f"{root}/c"], rng.randrange(3)),
        known_images=rng.sample(places, rng.randrange(3)),
    )

    def searched(volume: Volume) -> object:
        images = []
        for place in places:
            with volume.open(place) as store:
                images.append((linkage_id_of(store, volume), place))
        folders = [root, f"{root}/a/b"]
        return (
            children_of(images, options, volume=volume),
            [find_children(linkage_id, folders, raw_parent=place, volume=volume) for linkage_id, place in images],
            [find_by_id([linkage_id], folders, volume=volume) for linkage_id, _ in images],
        )

    with without_files():
        found = searched(volume)
    assert not volume.open_files
    volume.write_to(Path("/"))
    assert found == searched(LOCAL)


def test_some_children_are_found_in_memory() -> None:
    """Children beside an image, and in another folder that it records, are found, and no others."""
    volume = MemoryVolume()
    for place in ("/srv/base.vhd", "/srv/lone.vhd"):
        image(volume, place)
    for place in ("/srv/one.vhd", "/srv/two.vhd", "/far/three.vhd"):
        image(volume, place, "/srv/base.vhd")
    image(volume, "/srv/four.vhd", "/srv/one.vhd")
    with without_files():
        base_id = linkage_id_of(volume.open("/srv/base.vhd"), volume)
        options = OpenOptions(known_images=["/far/three.vhd"], parent_dirs=["/srv"])
        (found,) = children_of([(base_id, "/srv/base.vhd")], options, volume=volume)
        beside_it = find_children(base_id, ["/srv"], volume=volume)
    assert sorted(str(child) for child in found) == ["/far/three.vhd", "/srv/one.vhd", "/srv/two.vhd"]
    assert sorted(beside_it) == ["/srv/one.vhd", "/srv/two.vhd"]


def test_child_whose_change_did_not_finish_is_found_by_its_undo_log(tmp_path: Path) -> None:
    """A child counts for the parent that it has again once its unfinished change is undone."""
    volume, root = MemoryVolume(), os.path.realpath(tmp_path)
    for name in ("old", "new"):
        image(volume, f"{root}/{name}.vhd")
    leaf = f"{root}/leaf.vhd"
    store = image(volume, leaf, f"{root}/old.vhd")
    after = store.copy()
    formats.named("vhd").relink(after, reference(volume, leaf, f"{root}/new.vhd"))
    pages = range(0, after.size(), SECTOR_SIZE)
    writes = [(at, new) for at in pages if (new := after.pread(at, SECTOR_SIZE)) != store.pread(at, SECTOR_SIZE)]
    log = plan_change(store, pending.id_of(store), writes, after.size())
    volume.add(f"{root}/.leaf.vhd.vhdkit-undo").pwrite(0, encode(log))
    apply_change(store, log)

    def searched(volume: Volume) -> list[list[str]]:
        families = []
        for name in ("old", "new"):
            with volume.open(f"{root}/{name}.vhd") as parent:
                families.append(find_children(linkage_id_of(parent, volume), [root], volume=volume))
        return families

    with without_files():
        assert searched(volume) == [[leaf], []]
    volume.write_to(Path("/"))
    assert searched(LOCAL) == [[leaf], []]


@pytest.mark.parametrize("history", ["as left", "moved", "copied"])
def test_marked_child_is_found_where_its_mark_leads(tmp_path: Path, history: str) -> None:
    """A record of children in other folders is read from the parent's volume, with the same result there."""
    volume, root = MemoryVolume(), os.path.realpath(tmp_path)
    base, leaf = f"{root}/bases/base.vhd", f"{root}/vm/leaf.vhd"
    image(volume, base)
    image(volume, leaf, base)
    was = root if history == "as left" else f"{root}/old"
    mark = Mark(f"{was}/vm/leaf.vhd", pending.id_of(volume.files[leaf]), pending.id_of(volume.files[base]), ())
    if history == "copied":
        volume.add(f"{was}/bases/base.vhd", volume.files[base].copy())
        volume.add(f"{was}/vm/leaf.vhd", volume.files[leaf].copy())
    document = {"format": "vhdkit children record 1", "parent": f"{was}/bases/base.vhd", "children": [mark.document]}
    volume.add(marks.record_path(base, volume)).pwrite(0, json.dumps(document).encode())

    def searched(volume: Volume) -> object:
        with volume.open(base) as store:
            images = [(linkage_id_of(store, volume), base)]
            return children_of(images, OpenOptions(), volume=volume), mark_findings(store, OpenOptions(), volume)

    with without_files():
        found = searched(volume)
    volume.write_to(Path("/"))
    assert isinstance(found, tuple) and [child.path for child in found[0][0]] == [leaf]
    assert [finding.code for finding in found[1]] == ["children-elsewhere"]
    assert found == searched(LOCAL)
