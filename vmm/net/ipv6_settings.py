# SPDX-License-Identifier: Apache-2.0
"""The kernel's IPv6 settings of a switch's interfaces: the host's IPv6 on a bridge, and none on a tap.

Decides that the host has no IPv6 on the bridge of a switch without an IPv6 network, and accepts no router
advertisements there: a guest's advertisement would become the host's default route (as in CVE-2020-13401). On the
bridge of an external switch, where the host's own adapter is, IPv6 is set as it was on its card. Names and meanings:
the kernel's Documentation/networking/ip-sysctl.rst.

`INV-NO-GUEST-ROUTER`: no frame of a guest gives the host an address or a route through a bridge of ours that is not
the host's own adapter, even if IPv6 is enabled for all interfaces.
"""

from __future__ import annotations

from vmm.net import settings

NONE = (("accept_ra", "0"), ("autoconf", "0"), ("accept_redirects", "0"), ("disable_ipv6", "1"))  # of a bridge
# The settings of a card that decide how its host is found in IPv6. Settings that follow from the link, such as its
# MTU, are not among them, nor those that only root may read.
_OF_A_CARD = (
    "forwarding",
    "accept_ra",
    "accept_ra_defrtr",
    "ra_defrtr_metric",
    "accept_ra_from_local",
    "accept_ra_min_hop_limit",
    "accept_ra_min_lft",
    "accept_ra_mtu",
    "accept_ra_pinfo",
    "accept_ra_rt_info_min_plen",
    "accept_ra_rt_info_max_plen",
    "accept_ra_rtr_pref",
    "accept_redirects",
    "accept_dad",
    "addr_gen_mode",
    "autoconf",
    "dad_transmits",
    "max_addresses",
    "optimistic_dad",
    "router_solicitations",
    "temp_prefered_lft",
    "temp_valid_lft",
    "use_optimistic",
    "use_tempaddr",
    "disable_ipv6",
)


def of_card(name: str) -> tuple[tuple[str, str], ...]:
    """(setting, value) of everything in which a card differs from new interfaces."""
    found = []
    for one in _OF_A_CARD:
        value = settings.value(_path(name, one))
        if value is not None and value != settings.value(_path("default", one)):
            found.append((one, value))
    return tuple(found)


def write(name: str, values: tuple[tuple[str, str], ...]) -> None:
    """Set these on an interface; those that this kernel does not have are skipped. Raises VmmError."""
    for setting, value in values:
        settings.write(_path(name, setting), value)


def _path(interface: str, setting: str) -> str:
    return f"net/ipv6/conf/{interface}/{setting}"


def close_tap(name: str) -> None:
    """Keep the host from using IPv6 on a guest's tap: it would announce itself to the guest."""
    write(name, (("disable_ipv6", "1"),))
