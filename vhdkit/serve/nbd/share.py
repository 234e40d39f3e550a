# SPDX-License-Identifier: Apache-2.0
"""How much of the time uncommon work may take while others are served.

Uncommon is what costs far more than its request: listings, zeroing, trimming, parts of sectors. Decides when the next
slice of such work may begin. Must not know whose it is or what it does. Pure: times and costs are nanoseconds.

All uncommon work of a server shares one account, however many clients and threads it comes from: after a slice, none
begins for `REST` times its cost. So as long as others are served, uncommon work takes at most one part in `REST + 1`
of the time, and clients that only read and write keep the rest. The debt of a slice has a limit: a slice that waited
for a device took less from others than its time.
"""

from __future__ import annotations

REST = 11
MOST_REST_NS = 50_000_000


class Share:
    """One account."""

    def __init__(self) -> None:
        self._free_ns = 0

    def left_ns(self, now_ns: int) -> int:
        """How long none may begin; 0 if one may."""
        return max(self._free_ns - now_ns, 0)

    def charge(self, now_ns: int, cost_ns: int) -> None:
        """A slice of that cost has ended."""
        free_ns = max(self._free_ns, now_ns) + REST * cost_ns
        self._free_ns = min(free_ns, now_ns + MOST_REST_NS)
