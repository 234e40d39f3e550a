# SPDX-License-Identifier: Apache-2.0
"""Against which earlier night a disk is saved, and how it is found out what has changed since.

Decides which mark is believed: the disk's chain is walked from the top, and the first layer that reads as a night
which the repository still has is the reference. What lies above it is the increment, and its parent is *that* night's
image, not the newest one's. So several snapshots since the last night are one increment; a machine that was taken back
in time goes on from the older night; and a night that failed makes the next one larger. Without a reference the disk
is compared with its newest night, and without any night all of it is saved.

A mark is evidence, not proof (`references`): the layer that it is beside is compared with the night at some
random places, and if one differs, the whole disk is compared.

Must not know how an image is written.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vhdkit.backup.manifest import How, Manifest
from vhdkit.backup.repository import Night
from vhdkit.chain.engine.blockmap import ZERO
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names import lineage
from vhdkit.chain.records import references
from vhdkit.chain.verbs.merge_parts import file_of_layer
from vhdkit.image import Layer
from vhdkit.units import KIB, round_down, whole_sectors

SAMPLES = 64  # places compared each night: that many reads take less than a second on a slow disk
SAMPLE_BYTES = 16 * KIB
MAX_DEPTH = 128  # layers of a chain in the repository: a restore adds two, and a chain has at most 254


@dataclass(frozen=True, slots=True)
class Basis:
    """How a disk is saved. For LAYERS, `index` is the reference's place in the disk's chain; `night` is what a new
    image stands on, None for FULL."""

    how: How
    night: Manifest | None = None
    index: int | None = None


def find_basis(chain: Chain, disk: tuple[str, str, str], nights: Sequence[Night], serial: str = "") -> Basis:
    """The basis for the disk of an open chain, held by the caller. Nothing is compared yet.

    `disk` are the ids of the repository, the machine and the disk; `serial` is as for `newest_basis`.
    """
    by_id = {one.id: one for one in _of_disk(disk[-1], nights)}
    for index, layer in enumerate(chain.layers):
        if not by_id or was_written(chain.layers[max(index - 1, 0) :]):
            continue
        marked = [one.night for one in references.marks_of(file_of_layer(layer))]
        known = [by_id[one.night_id] for one in marked if one.place == disk and one.night_id in by_id]
        if known:
            return Basis(How.LAYERS, max(known, key=lambda one: one.night), index)
    return newest_basis(disk[-1], nights, serial)


def newest_basis(disk_id: str, nights: Sequence[Night], serial: str = "") -> Basis:
    """The basis without marks: the newest night of this disk, if there is one.

    If the newest disk with this id had another `serial`, this is another disk, and is saved whole.
    """
    of_disk = _of_disk(disk_id, nights)
    newest = of_disk[-1].disk(disk_id) if of_disk else None
    if newest is not None and serial and newest.serial and serial != newest.serial:
        return Basis(How.FULL)
    return Basis(How.COMPARED, of_disk[-1]) if of_disk else Basis(How.FULL)


def _of_disk(disk_id: str, nights: Sequence[Night]) -> list[Manifest]:
    """The nights that can be restored and have this disk, oldest first."""
    whole = [one.manifest for one in nights if one.manifest is not None and not one.manifest.dropped]
    return [one for one in whole if one.disk(disk_id) is not None]


def was_written(layers: Sequence[Layer]) -> bool:
    """True if another program wrote to one of these layers after its child was made, as far as that is known."""
    return any(one.code == lineage.WRITTEN for layer in layers for one in layer.findings)


def differing_sample(one: Chain, other: Chain, rng: random.Random | None = None) -> int | None:
    """Compare two disks that should read alike at random places; the offset of one that differs, or None.

    Places are drawn from the blocks in which either has space. Later reads of both chains are slow. Raises
    IoFailed.
    """
    if one.size_bytes != other.size_bytes:
        return min(one.size_bytes, other.size_bytes)
    for chain in (one, other):
        chain.map.walked_once()  # so few reads are not worth a fine table: its memory would be filled for each of them
    rng = rng or random.SystemRandom()
    buffers = memoryview(bytearray(SAMPLE_BYTES)), memoryview(bytearray(SAMPLE_BYTES))
    for begin in [*_places(one, rng, SAMPLES // 2), *_places(other, rng, SAMPLES - SAMPLES // 2)]:
        length = min(SAMPLE_BYTES, one.size_bytes - begin)
        for chain, buffer in zip((one, other), buffers, strict=True):
            chain.read_into(whole_sectors(begin), buffer[:length])
        if buffers[0][:length] != buffers[1][:length]:
            return begin
    return None


def _places(chain: Chain, rng: random.Random, count: int) -> list[int]:
    """Offsets of places in which the chain may have data, random, in order."""
    grains = np.flatnonzero(np.asarray(chain.map.entries) != ZERO)
    found = set()
    for _ in range(count if len(grains) else 0):
        grain = int(grains[rng.randrange(len(grains))]) * chain.map.grain_bytes
        end = min(grain + chain.map.grain_bytes, chain.size_bytes)
        found.add(round_down(rng.randrange(grain, end), min(SAMPLE_BYTES, chain.map.grain_bytes)))
    return sorted(found)
