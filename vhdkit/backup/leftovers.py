# SPDX-License-Identifier: Apache-2.0
"""What nights that were never finished, and deletions that were interrupted, leave in a machine's folder.

Decides which files belong to no night, and removes them. Must not know how a night is written or dropped.

- Call it with the machine's lock held, with nights that were read after that: then nothing is being written.
- While a manifest cannot be read, or a prune is under way, only files that are newer than every night are leftovers:
  what an unreadable manifest names is unknown, and the images of a prune belong to its journal. Otherwise every image
  that no manifest names is one, whatever its number: a deletion that had no space for its journal may leave it, or a
  copy that was killed before the night was dropped; and so are the other files of a night that does not exist.
- Files with other names than a night gives are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from vhdkit import errors, formats
from vhdkit.backup.manifest import BaseRecord, DiskRecord, Manifest
from vhdkit.backup.names import SUMS_SUFFIX, ImagePlace, night_of, night_of_file, night_word
from vhdkit.backup.repository import MAX_FILES, META, PRUNE_FILE, MachineFolder, Night
from vhdkit.held_folder import HeldFolder


def remove_leftovers(machine: MachineFolder, nights: Iterable[Night]) -> list[str]:
    """Remove what belongs to none of the machine's `nights`; return the paths. Call with the lock held.

    Files under construction go if their process is dead.
    """
    known = list(nights)
    newest = max((one.number for one in known), default=0)
    named = {place for one in known if one.manifest is not None for place in places_of(one.manifest)}
    is_sure = all(one.manifest is not None for one in known) and not machine.folder.exists(PRUNE_FILE)
    removed = []
    machine.sweep()
    for disk_id in machine.disk_ids():
        with machine.images(disk_id) as folder:
            folder.sweep()
            for name in folder.names(MAX_FILES):
                made, place = night_of_file(name), ImagePlace(disk_id, name.removesuffix(SUMS_SUFFIX))
                if made is None or place in named:
                    continue
                if made > newest or (is_sure and _is_image(place.name, made)):
                    folder.remove(name)
                    removed.append(os.path.join(folder.path, name))
            folder.sync()
    live = {one.number for one in known if one.manifest is not None and not one.manifest.dropped}
    return [*removed, *_other_files(machine, newest, live if is_sure else None)]


def _is_image(name: str, night: int) -> bool:
    """True for the name that an image of this night gets, and no other."""
    stem, dot, _ = name.partition(".")
    return dot == "." and stem == night_word(night) and name.count(".") == 1 and formats.by_suffix(name) is not None


def _other_files(machine: MachineFolder, newest: int, live: set[int] | None) -> list[str]:
    """Remove the folders of other files of nights that do not exist: later ones; all, if `live` is known."""
    try:
        meta = machine.folder.folder(META)
    except errors.NotFound:
        return []
    with meta:
        found = [(name, night_of(name) or 0) for name in meta.names(MAX_FILES)]
        gone = [name for name, night in found if night > newest or (night and live is not None and night not in live)]
        return [path for name in gone for path in remove_whole(meta, name)]


def remove_whole(above: HeldFolder, name: str) -> list[str]:
    """Remove a folder of files, durably; return its path, or nothing if it contains folders, which are not ours."""
    try:
        with above.folder(name) as folder:
            folder.sweep()
            for one in folder.names(MAX_FILES):
                folder.remove(one)
            folder.sync()
    except errors.NotFound:
        return []
    removed = above.remove_folder(name)
    above.sync()
    return [os.path.join(above.path, name)] if removed else []


def places_of(manifest: Manifest) -> Iterator[ImagePlace]:
    """Every image that a manifest names."""
    records: list[DiskRecord | BaseRecord] = [*manifest.disks, *manifest.bases]
    for one in records:
        yield one.image
        if one.parent_image is not None:
            yield one.parent_image
