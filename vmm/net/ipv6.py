# SPDX-License-Identifier: Apache-2.0
"""IPv6 of a card that becomes a port of a bridge: off on the card, and on again where it was on.

Decides that a port has no IPv6 of the host's: one that keeps addresses and routes leads the host's own packets to a
card that no longer answers. Must not know addresses, nor what of IPv6 the bridge has (`ipv6_settings`).
"""

from __future__ import annotations

from vmm.net import settings

_OFF = "net/ipv6/conf/{}/disable_ipv6"


def hears_routers(name: str) -> bool:
    """True when the kernel itself takes addresses and routes from routers' advertisements on the interface."""
    return settings.value(f"net/ipv6/conf/{name}/accept_ra") not in (None, "0")


def is_off(name: str) -> bool | None:
    """True when the interface has no IPv6; None on a kernel without it."""
    value = settings.value(_OFF.format(name))
    return None if value is None else value != "0"


def switch_off(name: str) -> None:
    """Take all of the interface's addresses and routes of IPv6, and have it make none. Raises VmmError."""
    if is_off(name) is False:
        settings.write(_OFF.format(name), "1")


def switch_on(name: str) -> None:
    """As before `switch_off`; not where it was switched off everywhere since. Raises VmmError."""
    if is_off(name) and settings.value(_OFF.format("all")) == "0":
        settings.write(_OFF.format(name), "0")
