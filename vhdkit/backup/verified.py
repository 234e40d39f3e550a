# SPDX-License-Identifier: Apache-2.0
"""The record of a verification: how far it is, and what it has found damaged.

Decides what of it is believed later: a file counts as verified, or as damaged, only together with the root of its
sums, so a file that was written anew since then counts as neither. Must not know how a file is verified.

The record is a convenience: without it a verification starts at the beginning. It is bounded, and left out where a
repository cannot be written to.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime

from vhdkit import errors
from vhdkit.backup.documents import MAX_DOCUMENT_BYTES, DamagedRepository, encoded, parsed, time_word
from vhdkit.backup.graph import Images
from vhdkit.backup.names import ImagePlace
from vhdkit.held_folder import HeldFolder

FILE = "verify.json"
MAX_DAMAGED = 1000
_MARK_CHARACTERS = 16
_MAX_MARKS = 40_000  # more images than a machine has nights


@dataclass(slots=True)
class Verified:
    """How far a verification is. `marks` are the images found right, `damaged` what is wrong with others, by text of
    their place and root of their sums; `files` what is wrong with other files, by night and name.
    """

    begun: datetime
    finished: datetime | None = None
    marks: set[str] = field(default_factory=set)
    damaged: dict[tuple[str, str], str] = field(default_factory=dict)
    files: dict[tuple[int, str], str] = field(default_factory=dict)
    sample_percent: int | None = None

    def damaged_now(self, images: Images) -> dict[ImagePlace, str]:
        """What is still damaged: the images whose sums are those that were found wrong."""
        return {
            record.place: self.damaged[key]
            for record in images.records.values()
            if (key := (record.place.text, record.sums_root)) in self.damaged
        }


def mark_of(place: ImagePlace, sums_root: str) -> str:
    """The word for an image with this content."""
    return hashlib.sha256(f"{place.text} {sums_root}".encode()).hexdigest()[:_MARK_CHARACTERS]


def read_verified(machine: HeldFolder) -> Verified | None:
    """The record of the last verification; None without one, and if it cannot be read."""
    try:
        fields = parsed(machine.read(FILE, MAX_DOCUMENT_BYTES), os.path.join(machine.path, FILE))
        finished = fields.flag("is_finished")
        found = Verified(
            fields.time("begun"),
            fields.time("finished") if finished else None,
            set(fields.texts("verified", _MAX_MARKS)),
            sample_percent=fields.optional_number("sample_percent", 1, 100),
        )
        for one in fields.objects("damaged", MAX_DAMAGED):
            problem = one.taken("problem", bool)
            found.damaged[one.taken("image", ImagePlace.of_text), one.taken("sums_root", bool)] = problem
        for one in fields.objects("damaged_files", MAX_DAMAGED):
            found.files[one.number("night", 1), one.taken("name", bool)] = one.taken("problem", bool)
        return found
    except (errors.NotFound, errors.InvalidArgument, DamagedRepository, errors.UnsupportedFormat):
        return None


def write_verified(machine: HeldFolder, found: Verified) -> bool:
    """Record how far it is; False where that cannot be written."""
    document = {
        "format": 1,
        "begun": time_word(found.begun),
        "is_finished": found.finished is not None,
        "finished": time_word(found.finished or datetime.now(UTC)),
        "sample_percent": found.sample_percent,
        "verified": sorted(found.marks)[:_MAX_MARKS],
        "damaged": [
            {"image": image, "sums_root": root, "problem": problem[:500]}
            for (image, root), problem in list(found.damaged.items())[:MAX_DAMAGED]
        ],
        "damaged_files": [
            {"night": night, "name": name, "problem": problem[:500]}
            for (night, name), problem in list(found.files.items())[:MAX_DAMAGED]
        ],
    }
    with contextlib.suppress(errors.VhdkitError):
        machine.write(FILE, encoded(document), replace=True)
        return True
    return False
