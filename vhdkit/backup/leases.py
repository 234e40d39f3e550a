# SPDX-License-Identifier: Apache-2.0
"""Leases: a night that something still reads is neither pruned nor deleted.

Decides what a lease says, which one still counts, and when one is removed. Must not know who reads a night, nor how.

A lease is a file, so it counts across hosts. One that ends with its process says which process made it, and no longer
counts when that process is certainly dead (`maker`). A lasting one stays until it is released: a machine that was
started from a night reads it even after the host has restarted.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from vhdkit import errors
from vhdkit.backup.documents import MAX_DOCUMENT_BYTES, encoded, parsed, time_word
from vhdkit.backup.names import MAX_NIGHT, is_name, is_unique_id, new_unique_id
from vhdkit.held_folder import HeldFolder
from vhdkit.maker import is_maker_dead, maker_word

FOLDER = "leases"
MAX_LEASES = 10_000
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class NightLease:
    """One lease of a night. `purpose` is for people; `maker` is None for a lasting one, and where it is unknown."""

    id: str
    machine_id: str
    night: int
    purpose: str
    since: datetime
    lasting: bool
    maker: str | None = None
    is_dead: bool = False


def leases(root: HeldFolder) -> list[NightLease]:
    """Every lease in the repository, also those of dead processes. Raises DamagedRepository for one that is damaged:
    it may protect any night.
    """
    try:
        folder = root.folder(FOLDER)
    except errors.NotFound:
        return []
    with folder:
        found = (_read(folder, name) for name in folder.names(MAX_LEASES) if name.endswith(_SUFFIX))
        return [one for one in found if one is not None]


def add_lease(
    root: HeldFolder, machine_id: str, night: int, purpose: str, *, lasting: bool, lease_id: str | None = None
) -> NightLease:
    """Make a lease; it is on the device when this returns. `lease_id`: 32 random hexadecimal digits, for a
    caller that records it first; None to draw it here.

    The caller then checks that the night still exists, and that no prune is under way (`MachineFolder.reading`): a
    prune first marks what it drops and then reads the leases, so one of the two sees the other.
    """
    assert lease_id is None or is_unique_id(lease_id)
    lease = NightLease(
        lease_id or new_unique_id(),
        machine_id,
        night,
        purpose,
        datetime.now(UTC),
        lasting,
        None if lasting else maker_word(),
    )
    document = {
        "format": 1,
        "id": lease.id,
        "machine": machine_id,
        "night": night,
        "purpose": purpose,
        "since": time_word(lease.since),
        "lasting": lasting,
        "maker": lease.maker,
    }
    with root.made_folder(FOLDER) as folder:
        folder.write(lease.id + _SUFFIX, encoded(document))
    return lease


def release(root: HeldFolder, lease_id: str) -> bool:
    """End a lease; False if there is none with this id. Raises InvalidArgument for text that is no id."""
    if not is_unique_id(lease_id):
        raise errors.InvalidArgument(f"{errors.printable(lease_id)!r} is not the id of a lease")
    try:
        folder = root.folder(FOLDER)
    except errors.NotFound:
        return False
    with folder:
        removed = folder.remove(lease_id + _SUFFIX)
        folder.sync()
    return removed


@contextlib.contextmanager
def leased(root: HeldFolder, machine_id: str, night: int, purpose: str) -> Iterator[NightLease | None]:
    """A lease for as long as the block runs; None where nothing can be written: what is read is held all the same."""
    try:
        lease = add_lease(root, machine_id, night, purpose, lasting=False)
    except (errors.ReadOnly, errors.AccessDenied):
        yield None
        return
    try:
        yield lease
    finally:
        release(root, lease.id)


def leased_nights(found: list[NightLease], machine_id: str) -> dict[int, NightLease]:
    """The nights of a machine that leases protect, each with one of its leases."""
    return {one.night: one for one in found if one.machine_id == machine_id and not one.is_dead}


def drop_dead(root: HeldFolder, found: list[NightLease]) -> None:
    """Remove the leases of dead processes."""
    for one in found:
        if one.is_dead:
            release(root, one.id)


def _read(folder: HeldFolder, name: str) -> NightLease | None:
    """A lease; None if it was released meanwhile."""
    try:
        with folder.file(name) as store:
            raw, facts = store.pread(0, MAX_DOCUMENT_BYTES + 1), os.fstat(store.fileno())
    except errors.NotFound:
        return None
    assert stat.S_ISREG(facts.st_mode)
    fields = parsed(raw, os.path.join(folder.path, name))
    lease_id = fields.taken("id", is_unique_id)
    if lease_id + _SUFFIX != name:
        raise fields.damaged("id", "is not that of the file's name")
    maker, lasting = fields.optional("maker", bool), fields.flag("lasting")
    return NightLease(
        lease_id,
        fields.taken("machine", is_name),
        fields.number("night", 1, MAX_NIGHT),
        fields.taken("purpose", lambda _: True),
        fields.time("since"),
        lasting,
        maker,
        is_dead=not lasting and maker is not None and is_maker_dead(maker, facts),
    )
