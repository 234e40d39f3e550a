# SPDX-License-Identifier: Apache-2.0
"""A layer that a backup froze and that stays, so that the next night of its repository saves only what lies above it.

Decides what is recorded about such a layer, and about the repositories in which the machine has nights, and how these
records are validated. A layer is recorded in the tree of the machine, in the step in which the disks are frozen; from
then on the delete rule treats it as one that a snapshot needs: nothing is merged into it, but it may be merged down,
content and mark, into an image that nothing needs. What the layer reads as is not decided here but by the mark beside
it, which vhdkit checks: a wrong record costs space or time, never content.

Which repositories a machine has nights in is recorded by their paths, apart from the layers: those go when a snapshot
is applied, and by `vmm backup forget`, and a backup must know all the same that another repository is at the path now.

A record of a layer is of a night that is being written (`maker`, a word for that process) or of one that exists. The
former ends with its process; the latter when the next night of the repository exists, or by `vmm backup forget`. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmm.store.snapshots.snapshot import absolute_path

_ID = re.compile(r"[0-9a-f]{32}")
MAX_KEPT = 4096  # disks of a machine, times repositories
MAX_PATHS = 64  # of repositories that are remembered for a machine
MAX_AT_PATH = 16  # repositories that take turns at one path, such as disks that are carried away


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


def note_repository(
    known: Mapping[str, tuple[str, ...]], paths: Iterable[str], repository: str
) -> dict[str, tuple[str, ...]]:
    """`known` (path -> ids of repositories), and that this one was found under these paths; the oldest are dropped."""
    found = dict(known)
    for path in paths:
        others = [one for one in found.pop(path, ()) if one != repository]
        found[path] = (*others, repository)[-MAX_AT_PATH:]
    return dict(list(found.items())[-MAX_PATHS:])


def repositories_of(document: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Parse what `note_repository` returned. Raises ValueError, TypeError, AttributeError."""
    if len(document) > MAX_PATHS or any(len(ids) > MAX_AT_PATH for ids in document.values()):
        raise ValueError("too many repositories")
    for ids in document.values():
        if not isinstance(ids, list) or any(_ID.fullmatch(one) is None for one in ids):
            raise ValueError("id")
    return {absolute_path(path): tuple(ids) for path, ids in document.items()}
