# SPDX-License-Identifier: Apache-2.0
"""What Azure requires of an image: a fixed VHD of whole MiB. Decides sizes only; must not know how one is written."""

from __future__ import annotations

from vhdkit.units import MIB, round_up

AZURE_UNIT_BYTES = MIB


def azure_size(size_bytes: int) -> int:
    """The size that Azure accepts: rounded up to a whole number of MiB, at least one."""
    return max(round_up(size_bytes, AZURE_UNIT_BYTES), AZURE_UNIT_BYTES)
