# SPDX-License-Identifier: Apache-2.0
"""What an examination of an image reports: one finding for each fact that is worth reporting.

Decides the shape of a finding and the order of severities. Opening an image collects the findings that do not prevent
its use (`info` shows them), `check` collects all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vhdkit.errors import CorruptImage, difference, printable


class Severity(IntEnum):
    """How bad a finding is. A NOTE does not mean that the image is at fault."""

    NOTE = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact: its stable code, where it is, and a sentence for people."""

    severity: Severity
    code: str
    message: str
    path: str
    structure: str | None = None
    offset_bytes: int | None = None

    def __str__(self) -> str:
        place = [printable(self.path)]
        if self.structure is not None:
            at = "" if self.offset_bytes is None else f" at byte {self.offset_bytes:#x}"
            place.append(f"{self.structure}{at}")
        return ": ".join([*place, self.message])


def left_by_repair(message: str, why: str) -> str:
    """`message` of a warning that `check --repair` does not clear, with the reason, so that users need not try."""
    return f"{message} (`check --repair` leaves it: {why})"


def finding_of(error: CorruptImage, path: str) -> Finding:
    """The finding that reports the same as `error`."""
    message = error.problem + difference(error.expected, error.found) + (f"; {error.hint}" if error.hint else "")
    return Finding(
        Severity.ERROR, error.reason.value, message, error.path or path, error.structure, error.offset_bytes
    )
