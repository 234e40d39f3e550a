# SPDX-License-Identifier: Apache-2.0
"""Shared bases of a repository: images on which disks of several machines stand, and when one is no longer needed.

Decides which bases go. Must not know how a night is written or dropped.

Bases belong to no machine, so no machine's lock protects them: `bases_held` does. Whoever adds a base, or a manifest
that names one, holds it until the manifest exists. A base goes if

- no manifest of any machine names it, dropped nights included, and all of them can be read;
- every lease is of a night that exists, so no reader counts on something unknown;
- no process has the file open as a reader or writer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from vhdkit import errors
from vhdkit.backup.leases import leases
from vhdkit.backup.leftovers import places_of
from vhdkit.backup.names import SUMS_SUFFIX, ImagePlace, is_image_name
from vhdkit.backup.renewal import sidecars
from vhdkit.backup.repository import MAX_FILES, Repository
from vhdkit.held_folder import HeldFolder

_LOCK = "bases.lock"


@contextlib.contextmanager
def bases_held(repository: Repository, doing: str) -> Iterator[None]:
    """Be the only process that adds bases, or removes them. Raises ImageInUse, Unprotected."""
    with repository.root.held_lock(_LOCK, f"{doing} (process {os.getpid()})"):
        yield


def remove_unused_bases(repository: Repository) -> list[str]:
    """Remove the bases that no night needs; return their paths. Whatever is in doubt stays.

    Raises DamagedRepository, AccessDenied, IoFailed; then some may have been removed.
    """
    with contextlib.ExitStack() as held:
        try:
            folder = held.enter_context(repository.bases())
        except errors.NotFound:
            return []
        if not folder.names(MAX_FILES):
            return []
        try:
            held.enter_context(bases_held(repository, "the removal of unused bases"))
        except errors.ImageInUse:
            return []
        needed = _needed(repository)
        return [] if needed is None else list(_removed(folder, needed))


def _needed(repository: Repository) -> set[str] | None:
    """The file names of the bases that a manifest names; None if that is uncertain."""
    found: set[str] = set()
    existing: set[tuple[str, int]] = set()
    for machine_id in repository.machine_ids():
        with repository.machine(machine_id) as machine:
            for night in machine.nights():
                if night.manifest is None:
                    return None
                existing.add((machine_id, night.number))
                found |= {place.name for place in places_of(night.manifest) if place.disk_id is None}
    if any((one.machine_id, one.night) not in existing for one in leases(repository.root) if not one.is_dead):
        return None
    return found


def _removed(folder: HeldFolder, needed: set[str]) -> Iterator[str]:
    """Remove the images that are not needed, each with its table and records, and tables without an image."""
    names = folder.names(MAX_FILES)
    for name in names:
        image = name.removesuffix(SUMS_SUFFIX)
        if image in needed or not is_image_name(image) or (name != image and image in names):
            continue
        with contextlib.suppress(errors.ImageInUse, errors.InvalidArgument):
            with folder.own_file(name):  # no process has it open
                for one in (name, ImagePlace(None, image).sums_name, *sidecars(folder, image)):
                    folder.remove(one)
            folder.sync()
            yield os.path.join(folder.path, name)
