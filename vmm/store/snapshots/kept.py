# SPDX-License-Identifier: Apache-2.0
"""A layer that a backup froze and that stays, so that the next night of its repository saves only what lies above it.

Decides what is recorded about such a layer, and how a record is validated. It is recorded in the tree of the machine,
in the step in which the disks are frozen; from then on the delete rule treats the layer as one that a snapshot needs:
nothing is merged into it, but it may be merged down, content and mark, into an image that nothing needs. What the
layer reads as is not decided here but by the mark beside it, which vhdkit checks: a wrong record costs space or time,
never content.

A record is of a night that is being written (`maker`, a word for that process) or of one that exists. The former ends
with its process; the latter when the next night of the repository exists, or by `vmm backup forget`. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vmm.store.snapshots.snapshot import absolute_path

_ID = re.compile(r"[0-9a-f]{32}")
MAX_KEPT = 4096  # disks of a machine, times repositories


@dataclass(frozen=True, slots=True)
class Kept:
    """A kept layer. `repository` and `night_id` are ids of the repository, `folder` is where it was, for people.

    `maker` identifies the process that writes the night (`vhdkit.maker_word`); None once the night exists.
    """

    repository: str
    folder: str
    night_id: str
    disk: str
    image: str
    maker: str | None = None


def kept_document(kept: Kept) -> dict[str, Any]:
    """A kept layer as JSON."""
    return {name: getattr(kept, name) for name in Kept.__dataclass_fields__}


def kept_of(document: dict[str, Any]) -> Kept:
    """Parse what `kept_document` wrote. Raises ValueError, TypeError."""
    kept = Kept(**document)
    for value in (kept.folder, kept.disk):
        if not isinstance(value, str):
            raise TypeError("a field of a kept layer")
    if kept.maker is not None and not isinstance(kept.maker, str):
        raise TypeError("maker")
    absolute_path(kept.image)
    for value in (kept.repository, kept.night_id):
        if _ID.fullmatch(value) is None:
            raise ValueError("id")
    return kept
