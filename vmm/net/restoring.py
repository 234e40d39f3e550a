# SPDX-License-Identifier: Apache-2.0
"""Restoring the addresses and routes that a card had, and reporting those that cannot be restored.

Decides the order, and that a refused one does not prevent the others. Must not know journals or switches.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vmm.model import errors
from vmm.net.bridge import Kernel
from vmm.net.plan import HostAddress, Route, in_order

# What reading a damaged record can raise, down to pyroute2's encoding of it.
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, struct.error)


@dataclass
class Resisted:
    """What could not be restored, in words; without `give_up` the first such error is raised."""

    give_up: bool = False
    words: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def trying(self, doing: str) -> Iterator[None]:
        """Record an error of the block, or raise it. A damaged record counts as an error, too."""
        try:
            yield
        except (errors.VmmError, *_DAMAGE) as error:
            if not isinstance(error, errors.VmmError):
                error = errors.VmmError(f"cannot {doing}: its record is damaged ({error})")
            if not self.give_up:
                raise error from None
            self.words.append(str(error))


def lost(before: Mapping[str, Any]) -> list[str]:
    """What a card that is now gone had."""
    had = [str(HostAddress(**one)) for one in before["addresses"]] + [
        f"the route to {_route(one)}" for one in before["routes"]
    ]
    return [f"the network card {before['name']} is gone; it had {', '.join(had)}"] if had else []


def put_back(kernel: Kernel, before: Mapping[str, Any], bridge: str, resisted: Resisted) -> None:
    """Restore addresses in their old order, on which the choice of a source depends, then the routes.

    Each ends when it did on `bridge`, where it may have been renewed; one that has expired there is not restored, nor
    are the routes that depend on it.
    """
    name = before["name"]
    had = [HostAddress(**one) for one in before["addresses"]]
    present, on_bridge = kernel.addresses(name), kernel.addresses(bridge)
    wanted = [now for one in had if (now := _today(one, before, (*present, *on_bridge))) is not None]
    if list(map(_lasting, present)) != list(map(_lasting, wanted)):
        for one in had:
            kernel.remove_address(name, one)
        for one in in_order(wanted):
            with resisted.trying(f"add the address {one} to {name}"):
                kernel.add_address(name, one)
    have, meanwhile = list(map(_known, kernel.routes(name))), kernel.routes(bridge)
    missing = [
        route
        for one in map(_route, before["routes"])
        if _known(one) not in have
        and not _depends_on_lost(one, had, wanted)
        and (route := _route_today(one, before, meanwhile)) is not None
    ]
    _give_routes(kernel, name, missing, resisted)


def _give_routes(kernel: Kernel, name: str, missing: list[Route], resisted: Resisted) -> None:
    """Add routes, which are in the kernel's order: a route through a gateway may precede the route to the gateway, so
    refused routes are tried again after the others.
    """
    while missing:
        refused = {one: error for one in missing if (error := _refusal(kernel, name, one)) is not None}
        if len(refused) == len(missing):  # the gateway's own network was gone before, but it was reached, so it exists
            refused = {
                one: error
                for one, error in refused.items()
                if one.gateway is None or _refusal(kernel, name, replace(one, on_link=True)) is not None
            }
            for error in refused.values():
                with resisted.trying("add a route"):
                    raise error
            return
        missing = list(refused)


def _lasting(one: HostAddress) -> HostAddress:
    return replace(one, valid_seconds=None, preferred_seconds=None, is_unproven=False)


def _today(one: HostAddress, before: Mapping[str, Any], now: Iterable[HostAddress]) -> HostAddress | None:
    """An address with its lifetime as of now: the longest that it got since, or the rest of its own. None if it has
    expired.
    """
    if one.valid_seconds is None:
        return one
    renewed = [other for other in now if other.address == one.address and other.valid_seconds is not None]
    if renewed:
        newest = max(renewed, key=lambda other: other.valid_seconds or 0)
        return replace(one, valid_seconds=newest.valid_seconds, preferred_seconds=newest.preferred_seconds)
    valid = _left(one.valid_seconds, before)
    preferred = None if one.preferred_seconds is None else _left(one.preferred_seconds, before)
    return None if valid == 0 else replace(one, valid_seconds=valid, preferred_seconds=preferred)


def _route_today(one: Route, before: Mapping[str, Any], now: Iterable[Route]) -> Route | None:
    """As `_today`, for a route."""
    if one.expires_seconds is None:
        return one
    renewed = [other for other in now if _known(other) == _known(one)]
    if renewed:
        return replace(one, expires_seconds=renewed[0].expires_seconds)
    left = _left(one.expires_seconds, before)
    return None if left == 0 else replace(one, expires_seconds=left)


def _depends_on_lost(route: Route, had: Iterable[HostAddress], wanted: Iterable[HostAddress]) -> bool:
    """True for a route that the kernel would have removed together with an expired address: a route from that address,
    and for IPv4 every route once the interface has no address.
    """
    is_six = ":" in route.destination
    before, left = ({one.address.partition("/")[0] for one in some if one.is_six == is_six} for some in (had, wanted))
    if route.source is not None and route.source in before - left:
        return True
    return not is_six and bool(before) and not left


def _known(one: Route) -> Route:
    """The route without what changes; of an announced route only its destination, since it comes again by itself."""
    if one.is_advertised:
        return Route(one.destination, one.gateway, table=one.table, protocol=one.protocol)
    return replace(one, expires_seconds=None)


def _left(seconds: int, before: Mapping[str, Any]) -> int:
    """What is left now of a time that was left when the record was written."""
    return max(0, int(seconds - (time.time() - before["at"])))


def _route(document: Mapping[str, Any]) -> Route:
    return Route(**{**document, "metrics": tuple((key, value) for key, value in document.get("metrics", ()))})


def _refusal(kernel: Kernel, name: str, route: Route) -> errors.VmmError | None:
    try:
        kernel.add_route(name, route)
    except errors.VmmError as error:
        return error
    return None
