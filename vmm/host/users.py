# SPDX-License-Identifier: Apache-2.0
"""User ids for untrusted programs: numbers that nothing else on the host uses.

Decides which user a machine's QEMU, or a switch's helper, runs as when vmm runs as root: one of its own, derived from
its id, so that it is the same each time and needs no entry in any user database.
"""

from __future__ import annotations

import os

from vmm.model.errors import Unsupported

# systemd's table of user ids (UIDS-GIDS) lists 0x70000000 to 0x7FFFFFFF as unused: 28 bits.
FIRST_USER_ID = 0x70000000
_ID_DIGITS = 7  # hexadecimal digits of the id, 4 bits each
# Used where the kernel maps fewer ids (in a container): systemd's range for dynamic users of services.
_SMALL_USER_IDS = range(61184, 65520)


def user_of(identifier: str) -> int | None:
    """The user and group id for this id in hexadecimal; None if we are not root. Raises Unsupported."""
    if os.geteuid() != 0:
        return None
    number = int(identifier.replace("-", "")[:_ID_DIGITS], 16)
    for candidate in (FIRST_USER_ID + number, _SMALL_USER_IDS[number % len(_SMALL_USER_IDS)]):
        if _is_mapped(candidate):
            return candidate
    raise Unsupported(
        "no user id is left for it: this user namespace maps too few of them",
        hint="map at least 65536 user ids into this container",
    )


def _is_mapped(user_id: int) -> bool:
    """True if this id is mapped in our user namespace, both as a user and as a group."""
    for path in ("/proc/self/uid_map", "/proc/self/gid_map"):
        with open(path, encoding="ascii") as file:
            ranges = [(int(first), int(count)) for first, _, count in map(str.split, file)]
        if not any(first <= user_id < first + count for first, count in ranges):
            return False
    return True
