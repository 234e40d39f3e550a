# SPDX-License-Identifier: Apache-2.0
"""Users for programs that are not trusted: numbers that nobody else on the host has.

Decides which user a machine's QEMU, or a switch's helper, runs as when we are root: one of its own, out of its id, so
that it is the same each time and needs no entry anywhere.
"""

from __future__ import annotations

import os

from vmm.model.errors import Unsupported

# systemd's table of user ids (UIDS-GIDS) names 0x70000000 to 0x7FFFFFFF as used by nobody: 28 bits.
FIRST_USER_ID = 0x70000000
_ID_DIGITS = 7  # of the id, 4 bits each
# Where the kernel maps fewer ids (in a container): systemd's for users that exist as long as a service runs.
_SMALL_USER_IDS = range(61184, 65520)


def user_of(identifier: str) -> int | None:
    """The user, and group, of what has this id in hexadecimal; None where we are not root. Raises Unsupported."""
    if os.geteuid() != 0:
        return None
    number = int(identifier.replace("-", "")[:_ID_DIGITS], 16)
    for candidate in (FIRST_USER_ID + number, _SMALL_USER_IDS[number % len(_SMALL_USER_IDS)]):
        if _is_mapped(candidate):
            return candidate
    raise Unsupported(
        "there is no user id for it: this root maps too few of them",
        hint="map at least 65536 user ids into this container",
    )


def _is_mapped(user_id: int) -> bool:
    """True when this user id exists in our user namespace, as a user and as a group."""
    for path in ("/proc/self/uid_map", "/proc/self/gid_map"):
        with open(path, encoding="ascii") as file:
            ranges = [(int(first), int(count)) for first, _, count in map(str.split, file)]
        if not any(first <= user_id < first + count for first, count in ranges):
            return False
    return True
