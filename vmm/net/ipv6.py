# SPDX-License-Identifier: Apache-2.0
"""IPv6 of a card that becomes a port of a bridge: switched off on the card, and on again where it was on.

Decides that a port has none of the host's IPv6: a card that kept addresses and routes would attract the host's own
packets, without answers. Must not know addresses, nor the bridge's IPv6 (`ipv6_settings`).
"""

from __future__ import annotations

from vmm.net import settings

_OFF = "net/ipv6/conf/{}/disable_ipv6"


def hears_routers(name: str) -> bool:
    """True if the kernel itself takes addresses and routes from routers' advertisements on the interface."""
    return settings.value(f"net/ipv6/conf/{name}/accept_ra") not in (None, "0")


def is_off(name: str) -> bool | None:
    """True if IPv6 is disabled on the interface; None on a kernel without IPv6."""
    value = settings.value(_OFF.format(name))
    return None if value is None else value != "0"


def switch_off(name: str) -> None:
    """Remove all IPv6 addresses and routes of the interface, and keep it from creating any. Raises VmmError."""
    if is_off(name) is False:
        settings.write(_OFF.format(name), "1")


def switch_on(name: str) -> None:
    """Undo `switch_off`, unless IPv6 has been disabled everywhere since. Raises VmmError."""
    if is_off(name) and settings.value(_OFF.format("all")) == "0":
        settings.write(_OFF.format(name), "0")
