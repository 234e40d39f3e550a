# SPDX-License-Identifier: Apache-2.0
"""What this host forwards for a switch with NAT.

Decides that packets may arrive at any interface, including one that is created later: guests reach whatever the host's
routes lead to at that time, without any process watching. It also keeps the host from becoming a router between other
networks: a packet that neither comes from a bridge nor goes to one is forwarded only if it was before, or once an
administrator sets `ip_forward` (`Guard`). The kernel asks the interface at which a packet arrives
(`conf/NAME/forwarding`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmm.net import settings

_ONE = re.compile(r"net/ipv4/conf/[^/]+/forwarding")


@dataclass(frozen=True, slots=True)
class Guard:
    """The interfaces that forwarded before any switch. `is_needed`: the host is not set to forward everything."""

    is_needed: bool = True
    forwarded: tuple[str, ...] = ()


def _setting(name: str) -> str:
    return f"net/ipv4/conf/{name}/forwarding"


def _names() -> list[str]:
    return [name for name in settings.interfaces() if name not in ("all", "default", "lo")]


def begin(folder: str, holder: str) -> None:
    """Accept packets for forwarding at every interface. `end` undoes this, even if this was killed half-way."""
    done: set[str] = set()
    while names := [name for name in ("default", *_names()) if name not in done]:  # more may have appeared meanwhile
        settings.hold_all(folder, {_setting(name): "1" for name in names}, holder)
        done |= set(names)


def end(folder: str, holder: str) -> None:
    """Restore the state before `begin`, unless another program wants it otherwise."""
    settings.release_all(folder, holder, lambda name: _ONE.fullmatch(name) is not None)


def guard(folder: str) -> Guard:
    """The restriction for other networks from now on. If forwarding was not enabled yet, interfaces that forward now
    did so before.
    """
    if settings.value(_setting("all")) == "1":
        return Guard(is_needed=False)
    began = settings.before(folder, _setting("default")) is not None
    before = {one: settings.before(folder, one) if began else settings.value(one) for one in map(_setting, _names())}
    return Guard(forwarded=tuple(name for name in _names() if before.get(_setting(name)) == "1"))
