# SPDX-License-Identifier: Apache-2.0
"""Giving a card back the addresses and routes that it had, and what is said of those that cannot be given back.

Decides the order, and that one which is refused keeps no other from coming back. Must not know journals or switches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vmm.model import errors
from vmm.net.bridge import Kernel
from vmm.net.plan import Address, Route, in_order


@dataclass
class Resisted:
    """What could not be put back, in words; where nobody gives up, the first such error is raised."""

    give_up: bool = False
    words: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def trying(self, doing: str) -> Iterator[None]:
        """Note an error of the block, or raise it. A record that is not as we write it is an error, too."""
        try:
            yield
        except (errors.VmmError, LookupError, TypeError, ValueError, AttributeError) as error:
            if not isinstance(error, errors.VmmError):
                error = errors.VmmError(f"cannot {doing}: the record of it is damaged ({error})")
            if not self.give_up:
                raise error from None
            self.words.append(str(error))


def lost(before: Mapping[str, Any]) -> list[str]:
    """What a card had that is gone by now."""
    had = [str(Address(**one)) for one in before["addresses"]] + [
        f"the route to {_route(one)}" for one in before["routes"]
    ]
    return [f"the network card {before['name']} is gone, which had {', '.join(had)}"] if had else []


def put_back(kernel: Kernel, before: Mapping[str, Any], bridge: str, resisted: Resisted) -> None:
    """Addresses in their old order, which the choice of a source depends on, then the routes. They end when they
    did on `bridge`, where they may have been prolonged.

    Routes come in the kernel's order, in which the one through a gateway may stand before the way to the gateway: what
    is refused is tried again after the others.
    """
    name = before["name"]
    wanted = [Address(**one) for one in before["addresses"]]
    present = kernel.addresses(name)
    if list(map(_lasting, present)) != list(map(_lasting, wanted)):
        prolonged = _prolonged((*present, *kernel.addresses(bridge)))
        for one in wanted:
            kernel.remove_address(name, one)
        for one in in_order(wanted):
            valid, preferred = _left(one.valid_seconds, before, 1), _left(one.preferred_seconds, before, 0)
            if valid is not None and (newer := prolonged.get(one.address)) is not None:
                valid, preferred = newer.valid_seconds, newer.preferred_seconds
            with resisted.trying(f"give {name} the address {one}"):
                kernel.add_address(name, replace(one, valid_seconds=valid, preferred_seconds=preferred))
    have = list(map(_known, kernel.routes(name)))
    missing = [
        replace(one, expires_seconds=_left(one.expires_seconds, before, 1))
        for one in map(_route, before["routes"])
        if _known(one) not in have
    ]
    while missing:
        refused = {one: error for one in missing if (error := _refusal(kernel, name, one)) is not None}
        if len(refused) == len(missing):  # a gateway whose own network was gone before: it was reached, so it is there
            refused = {
                one: error
                for one, error in refused.items()
                if one.gateway is None or _refusal(kernel, name, replace(one, on_link=True)) is not None
            }
            for error in refused.values():
                with resisted.trying("lead a route"):
                    raise error
            return
        missing = list(refused)


def _lasting(one: Address) -> Address:
    return replace(one, valid_seconds=None, preferred_seconds=None, is_unproven=False)


def _prolonged(now: Iterable[Address]) -> dict[str, Address]:
    """By their addresses those that end, with the longest time that each has."""
    lent = (one for one in now if one.valid_seconds is not None)
    return {one.address: one for one in sorted(lent, key=lambda one: one.valid_seconds or 0)}


def _known(one: Route) -> Route:
    """Without what changes; of one that routers say all but where it leads, since it is made again by itself."""
    if one.is_advertised:
        return Route(one.destination, one.gateway, table=one.table, protocol=one.protocol)
    return replace(one, expires_seconds=None)


def _left(seconds: int | None, before: Mapping[str, Any], least: int) -> int | None:
    """Of a time that was left when it was written down: what is left of it now."""
    return None if seconds is None else max(least, int(seconds - (time.time() - before["at"])))


def _route(document: Mapping[str, Any]) -> Route:
    return Route(**{**document, "metrics": tuple((key, value) for key, value in document.get("metrics", ()))})


def _refusal(kernel: Kernel, name: str, route: Route) -> errors.VmmError | None:
    try:
        kernel.add_route(name, route)
    except errors.VmmError as error:
        return error
    return None
