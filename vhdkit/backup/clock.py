# SPDX-License-Identifier: Apache-2.0
"""Which time zone a moment is recorded with: the name of this host's zone, and what its clocks differ from UTC."""

from __future__ import annotations

from datetime import datetime, timedelta

from vhdkit import errors
from vhdkit.backup.keep import zone_named
from vhdkit.backup.manifest import is_zone_word
from vhdkit.folder import real_path

_LOCAL = "/etc/localtime"  # a link into a folder of zones
_ZONES = "/zoneinfo/"


def zone_here(moment: datetime) -> tuple[str, timedelta]:
    """The name of the zone of this process, such as "Europe/Berlin", and its offset at an aware moment.

    If the zone's name is not known, it is what clocks call it at that moment ("CET").
    """
    local = moment.astimezone()
    offset = local.utcoffset() or timedelta()
    name = real_path(_LOCAL).partition(_ZONES)[2]
    try:
        if name and moment.astimezone(zone_named(name)).utcoffset() == offset:
            return name, offset
    except errors.VhdkitError:
        pass
    word = local.tzname() or ""
    return (word if is_zone_word(word) else "UTC"), offset
