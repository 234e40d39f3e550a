# SPDX-License-Identifier: Apache-2.0
"""What this host forwards because of a switch with NAT.

Decides that packets may come in at any interface, also at one that is made later: guests reach whatever the host's
routes lead to by then, without being watched. And that the host becomes no router between others by that: what
neither comes from a bridge nor goes to one is forwarded only where it was before, or once an administrator switches
`ip_forward` on (`Guard`). The kernel asks the interface at which a packet comes in (`conf/NAME/forwarding`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmm.net import settings

_ONE = re.compile(r"net/ipv4/conf/[^/]+/forwarding")


@dataclass(frozen=True, slots=True)
class Guard:
    """Which interfaces forwarded before any switch. `is_needed`: the host is not set to forward everything."""

    is_needed: bool = True
    forwarded: tuple[str, ...] = ()


def _setting(name: str) -> str:
    return f"net/ipv4/conf/{name}/forwarding"


def _names() -> list[str]:
    return [name for name in settings.interfaces() if name not in ("all", "default", "lo")]


def begin(folder: str, holder: str) -> None:
    """Let packets come in anywhere; undone by `end`, also when this was killed half way."""
    done: set[str] = set()
    while names := [name for name in ("default", *_names()) if name not in done]:  # one may have come just before
        settings.hold_all(folder, {_setting(name): "1" for name in names}, holder)
        done |= set(names)


def end(folder: str, holder: str) -> None:
    """As before `begin`, unless another program wants it so."""
    settings.release_all(folder, holder, lambda name: _ONE.fullmatch(name) is not None)


def guard(folder: str) -> Guard:
    """What others are kept from now. Where nothing was switched on yet, what forwards now forwarded before."""
    if settings.value(_setting("all")) == "1":
        return Guard(is_needed=False)
    began = settings.before(folder, _setting("default")) is not None
    before = {one: settings.before(folder, one) if began else settings.value(one) for one in map(_setting, _names())}
    return Guard(forwarded=tuple(name for name in _names() if before.get(_setting(name)) == "1"))
