# SPDX-License-Identifier: Apache-2.0
"""The moment at which a copy changes what it has: images that a prune rewrote, nights that were dropped.

Decides what is recorded before, and in which order files change. Must not know the source: whatever is needed lies in
the copy when the journal is written, so an interrupted switch is finished without it.

    machines/MACHINE-ID/copying/0.data, 0.sums    what changes in an image, at its place in the file; its new table
                                00018.json        a new manifest
                        switch.json               the journal

    1  everything in `copying/`, on the device, compared with its sums      nothing has changed
    2  the journal; leases are read after it: a reader makes its lease first and then looks for the journal
    3  images: the changed ranges, compared again; then their tables
    4  manifests; those of dropped nights are removed
    5  images and other files that no night needs any more
    6  no journal, no `copying/`

From 2 on it is finished by whatever changes or reads the machine next (`finish_switch`). Between 3 and 4 nights on
these images cannot be read, so readers are refused while there is a journal (`MachineFolder.require_night`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from vhdkit import errors
from vhdkit.backup.carrying import bring, changed_between, copy_data
from vhdkit.backup.documents import MAX_DOCUMENT_BYTES, DamagedRepository, encoded, parsed
from vhdkit.backup.graph import Images
from vhdkit.backup.leases import drop_dead, leased_nights, leases
from vhdkit.backup.leftovers import remove_whole
from vhdkit.backup.manifest import Manifest, parse_manifest
from vhdkit.backup.names import ImagePlace, night_word
from vhdkit.backup.repository import META, SWITCH_FILE, MachineFolder
from vhdkit.store import ReadStore

COPYING = "copying"
_MAX_STEPS = 32_768
_JSON = ".json"


@dataclass(frozen=True, slots=True)
class Switch:
    """What the journal says: nights whose manifests are written, in this order, and removed; images whose content
    changes, by their numbers in `copying/`; images that go.
    """

    write: tuple[int, ...]
    remove: tuple[int, ...]
    rewritten: tuple[ImagePlace, ...]
    gone: tuple[ImagePlace, ...]


def data_name(number: int) -> str:
    """The file in `copying/` with the changed ranges of an image."""
    return f"{number}.data"


def table_name(number: int) -> str:
    """The file in `copying/` with the new table of an image."""
    return f"{number}.sums"


def manifest_name(night: int) -> str:
    """The file in `copying/` with the new manifest of a night."""
    return night_word(night) + _JSON


def begin_switch(machine: MachineFolder, switch: Switch) -> None:
    """Write the journal. Raises ImageInUse if a night that changes is read; then there is none."""
    document = {
        "format": 1,
        "write": [night_word(one) for one in switch.write],
        "remove": [night_word(one) for one in switch.remove],
        "rewritten": [one.text for one in switch.rewritten],
        "gone": [one.text for one in switch.gone],
    }
    machine.folder.write(SWITCH_FILE, encoded(document), replace=True)
    try:
        _refuse_read(machine, switch)
    except BaseException:
        machine.folder.remove(SWITCH_FILE)
        machine.folder.sync()
        raise


def _refuse_read(machine: MachineFolder, switch: Switch) -> None:
    """Raise ImageInUse if something reads a night that goes, or whose images change."""
    found = leases(machine.repository.root)
    drop_dead(machine.repository.root, found)
    manifests = [one.manifest for one in machine.nights() if one.manifest is not None]
    images, changing = Images(manifests), {*switch.rewritten, *switch.gone}
    for number, lease in sorted(leased_nights(found, machine.id).items()):
        needed = images.needed(one for one in manifests if one.night == number)
        if number in switch.remove or any(one.place in changing for one in needed):
            raise errors.ImageInUse(
                f"night {number} of the copy is read by {errors.printable(lease.purpose)}",
                path=machine.path,
                hint="wait until it has ended, and run the copy again",
            )


def finish_switch(machine: MachineFolder) -> bool:
    """Finish a switch, if there is a journal; False without one. Call with the machine's lock held.

    Raises DamagedRepository, ImageInUse, NoSpace, IoFailed; then the journal stays.
    """
    switch = _read(machine)
    if switch is None:
        return False
    with machine.folder.folder(COPYING) as staged:
        for number, place in enumerate(switch.rewritten):
            with staged.file(data_name(number)) as data, staged.file(table_name(number)) as table:
                _rewrite(machine, place, data, table)
        for night in switch.write:
            raw = staged.read(manifest_name(night), MAX_DOCUMENT_BYTES)
            machine.write_manifest(_parsed(machine, night, raw, staged.path), replace=True)
    for night in switch.remove:
        with contextlib.suppress(errors.NotFound):
            machine.remove_manifest(night)
    _remove(machine, switch)
    machine.folder.remove(SWITCH_FILE)
    machine.folder.sync()
    forget_staged(machine)
    return True


def forget_staged(machine: MachineFolder) -> None:
    """Remove `copying/`; without a journal nothing in it counts."""
    remove_whole(machine.folder, COPYING)


def _rewrite(machine: MachineFolder, place: ImagePlace, data: ReadStore, table: ReadStore) -> None:
    with machine.folder_of(place) as folder:
        changed = None
        with contextlib.suppress(errors.NotFound), folder.file(place.sums_name) as old:
            changed = changed_between(old, table)  # nothing if this has been done already
        with folder.own_file(place.name) as image:
            bring(data, image, table, changed)
        folder.sync()
        replace_table(machine, place, table)


def replace_table(machine: MachineFolder, place: ImagePlace, table: ReadStore) -> None:
    """Give an image a copy of this table."""
    with machine.folder_of(place) as folder, folder.new_file(place.sums_name, replace=True) as new:
        copy_data(table, new)


def _parsed(machine: MachineFolder, night: int, raw: bytes, folder: str) -> Manifest:
    path = os.path.join(folder, manifest_name(night))
    return parse_manifest(raw, path, repository=machine.repository.id, machine_id=machine.id, night=night)


def _remove(machine: MachineFolder, switch: Switch) -> None:
    """Remove images and other files that no night needs, as the manifests are now."""
    nights = machine.nights()
    manifests = [one.manifest for one in nights if one.manifest is not None]
    if len(manifests) == len(nights):
        named = set(Images(manifests).records)
        for place in switch.gone:
            if place not in named and place.disk_id is not None:
                with contextlib.suppress(errors.NotFound), machine.images(place.disk_id) as folder:
                    folder.remove(place.name)
                    folder.remove(place.sums_name)
                    folder.sync()
    dropped = {one.night for one in manifests if one.dropped}
    with contextlib.suppress(errors.NotFound), machine.folder.folder(META) as meta:
        for number in (*switch.remove, *(one for one in switch.write if one in dropped)):
            remove_whole(meta, night_word(number))


def _read(machine: MachineFolder) -> Switch | None:
    """The journal; None without one. Raises DamagedRepository: what it was about must not be guessed."""
    path = os.path.join(machine.path, SWITCH_FILE)
    try:
        fields = parsed(machine.folder.read(SWITCH_FILE, MAX_DOCUMENT_BYTES), path)
    except errors.NotFound:
        return None

    def nights(name: str) -> Iterator[int]:
        for one in fields.texts(name, _MAX_STEPS):
            if not (one.isdecimal() and one.isascii() and 0 < len(one) < 10 and int(one)):
                raise fields.damaged(name)
            yield int(one)

    def places(name: str) -> Iterator[ImagePlace]:
        for one in fields.texts(name, _MAX_STEPS):
            place = ImagePlace.of_text(one)
            if place is None or place.disk_id is None:
                raise DamagedRepository(f"names {errors.printable(one)}, which is no image of the machine", path=path)
            yield place

    return Switch(tuple(nights("write")), tuple(nights("remove")), tuple(places("rewritten")), tuple(places("gone")))


def images_in_switch(machine: MachineFolder) -> frozenset[ImagePlace]:
    """The images that a switch is changing, or was when it was interrupted: they differ from their sums."""
    with contextlib.suppress(errors.VhdkitError):
        switch = _read(machine)
        if switch is not None:
            return frozenset({*switch.rewritten, *switch.gone})
    return frozenset()
