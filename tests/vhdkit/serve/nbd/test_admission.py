# SPDX-License-Identifier: Apache-2.0
"""Which connection makes room for a new one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from vhdkit.serve.nbd.admission import LEAST_SHARE, STALLED_SECONDS, makes_room


@dataclass
class Fake:
    """A connection as the test wants it."""

    peer_key: str
    silent: float = 0
    used: bool = True
    idle: bool = True
    undecided: bool = False

    def is_undecided(self, seconds: float) -> bool:
        """As set."""
        return self.undecided

    def is_idle(self) -> bool:
        """As set."""
        return self.idle

    def silent_seconds(self) -> float:
        """As set."""
        return self.silent


def test_idle_guests_beside_a_greedy_peer() -> None:
    """A greedy peer makes room out of its own connections; guests that were idle for hours stay."""
    guests = [Fake(f"guest {number % 3}", silent=36000) for number in range(12)]
    greedy = [Fake("greedy", silent=number) for number in range(88)]
    assert makes_room(guests + greedy, "new", 100) is greedy[-1]
    greedy[5].used = False
    assert makes_room(guests + greedy, "new", 100) is greedy[5]
    assert makes_room(guests + greedy, "greedy", 100) is greedy[5], "the newcomer may be of the same peer"


def test_undecided_connections_come_first() -> None:
    """The oldest one without an export makes room, whatever else there is."""
    undecided = [Fake("a", undecided=True), Fake("b", undecided=True)]
    assert makes_room([Fake("c", 9e9), *undecided], "d", 3) is undecided[0]


def test_busy_connections_stay() -> None:
    """Of a greedy peer, those with something in flight stay, unless they have collected nothing for long."""
    busy = [Fake("a", silent=number / 10, idle=False) for number in range(100)]
    assert makes_room(busy, "b", 100) is None
    busy[7].silent = STALLED_SECONDS
    assert makes_room(busy, "b", 100) is busy[7]


CONNECTIONS = st.lists(
    st.builds(Fake, st.sampled_from("abcde"), st.floats(0, 1e6), st.booleans(), st.booleans()), max_size=120
)


@given(connections=CONNECTIONS, newcomer=st.sampled_from("abcdef"))
def test_only_the_greediest_peer_makes_room(connections: list[Fake], newcomer: str) -> None:
    """Whoever is disconnected is of the peer with most connections, and that one has more than an equal share."""
    found = makes_room(connections, newcomer, 100)
    counts = Counter(one.peer_key for one in connections)
    if found is None:
        return
    assert counts[found.peer_key] == max(counts.values())
    assert counts[found.peer_key] > max(LEAST_SHARE, 100 // len({*counts, newcomer}))
    assert found.idle or found.silent >= STALLED_SECONDS
