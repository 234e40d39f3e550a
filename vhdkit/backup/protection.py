# SPDX-License-Identifier: Apache-2.0
"""Protecting a night: it is neither pruned nor deleted until the protection ends.

Decides how the protection is recorded. Must not know what it prevents (`keep`, `pruning`).
"""

from __future__ import annotations

from dataclasses import replace

from vhdkit.backup.choosing import chosen
from vhdkit.backup.repository import MachineFolder


def protect(machine: MachineFolder, at: str | None = None, *, protected: bool = True) -> int:
    """Protect the night that a number or a time means, by default the newest, or end its protection.

    Returns its number; on the device when this returns. Raises NotFound, InvalidArgument, ImageInUse, NoSpace.
    """
    with machine.held("protect"):
        nights = machine.nights()
        live = [one.manifest for one in nights if one.manifest is not None and not one.manifest.dropped]
        manifest = chosen(live, at, machine.name)
        if manifest.protected is not protected:
            machine.write_manifest(replace(manifest, protected=protected), replace=True)
    return manifest.night
