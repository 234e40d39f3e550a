# SPDX-License-Identifier: Apache-2.0
"""Who is disconnected when there are too many clients.

Decides which connection makes room for a new one, or that none does. Must not know sockets or requests. Pure.

A guest may be idle for hours, and loses its disk if its connection is closed. So no client is disconnected for being
idle as long as there is room, and none of a peer that has only its share. A peer is a process on this machine, or
an address (of IPv6, a network of 64 bits, as a single machine can have all addresses of one). In this order,
the connection that makes room is

1. the oldest that has not chosen an export;
2. of the peer with most connections, if these are more than its share: one that never sent a request, else one that
   has been idle longest, with nothing in flight; else one that has not collected an answer for `STALLED_SECONDS`.

The share is an equal part of the limit, and at least `LEAST_SHARE`: a guest with several connections to each of its
disks is not greedy. If all peers have no more than their share, the new client is turned away. The rule cannot
protect an idle guest from another client of its own peer, for instance behind the same address translation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

LEAST_SHARE = 16
STALLED_SECONDS = 30.0


class Admitted(Protocol):
    """A connection."""

    used: bool  # it has sent a request

    @property
    def peer_key(self) -> Hashable:
        """The same for all connections of a peer."""
        ...

    def is_undecided(self, seconds: float) -> bool:
        """True if it has been connected longer than that without choosing an export."""
        ...

    def is_idle(self) -> bool:
        """True if nothing is in flight."""
        ...

    def silent_seconds(self) -> float:
        """How long ago it last sent or accepted something."""
        ...


T = TypeVar("T", bound=Admitted)


def makes_room(connections: Sequence[T], newcomer: Hashable, limit: int) -> T | None:
    """The connection to close for a new one of the peer `newcomer`, or None; `connections` in order of arrival."""
    for one in connections:
        if one.is_undecided(0):
            return one
    counts = Counter(one.peer_key for one in connections)
    if not counts:
        return None
    greedy, count = counts.most_common(1)[0]
    if count <= max(LEAST_SHARE, limit // len({*counts, newcomer})):
        return None
    theirs = [one for one in connections if one.peer_key == greedy]
    idle = [one for one in theirs if one.is_idle()]
    stalled = [one for one in theirs if one.silent_seconds() >= STALLED_SECONDS]
    for found in ([one for one in idle if not one.used], idle, stalled):
        if found:
            return max(found, key=lambda one: one.silent_seconds())
    return None
