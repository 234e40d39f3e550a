# SPDX-License-Identifier: Apache-2.0
"""Which interfaces can be the card of an external switch, and why others cannot. Pure.

Decides which interfaces the kernel would refuse (`br_add_if` in net/bridge/br_if.c), or would accept without working
as intended; the reasons say what helps. Must not know how the kernel is queried.
"""

from __future__ import annotations

from dataclasses import dataclass

ON_TOP = ("macvlan", "macvtap", "ipvlan", "ipvtap")  # kinds that take all frames of the card below them
_BONDS = ("bond", "team", "failover", "net_failover")


@dataclass(frozen=True, slots=True)
class InterfaceKind:
    """The kind of an interface, without its addresses. `name` is the kernel's, such as "bridge"; None: a card."""

    name: str | None = None
    master: str | None = None  # of the interface it is part of
    is_ethernet: bool = True
    on_top: tuple[str, ...] = ()  # interfaces that take all its frames


CARD = InterfaceKind()


@dataclass(frozen=True, slots=True)
class Candidate:
    """An interface that is to become the card of a switch."""

    name: str
    mac: str
    master: str | None
    is_wireless: bool
    shared_routes: tuple[str, ...]
    kind: InterfaceKind


def refusal(uplink: Candidate, bridge: str) -> str | None:
    """Why the interface cannot be the card of the switch with that bridge; None if it can."""
    name, master = uplink.name, uplink.master
    if not uplink.kind.is_ethernet or uplink.mac.strip("0:") == "":  # a loopback or a tunnel, which a bridge rejects
        return f"{name} is not a network card: it has no Ethernet address"
    if uplink.kind.name == "bridge":
        return f"{name} is a bridge: a bridge cannot be part of another; use the card that is part of {name}"
    if master not in (None, bridge):
        advice = f": take {master}" if uplink.kind.master in _BONDS else ""
        return f"{name} is already part of {master}{advice}"
    if uplink.is_wireless:
        return f"{name} is wireless: an access point accepts only frames from the card's own address"
    if uplink.kind.on_top:
        return (
            f"{', '.join(uplink.kind.on_top)} stand on {name} and take its frames: remove them, or take another card"
        )
    if uplink.kind.name in ON_TOP:
        return f"{name} is of kind {uplink.kind.name}: it gets only the frames for its own address"
    if uplink.shared_routes:
        ways = ", ".join(uplink.shared_routes)
        return f"the route to {ways} uses {name} and other cards: it cannot be moved"
    return None
