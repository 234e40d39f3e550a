# SPDX-License-Identifier: Apache-2.0
"""The card of an external switch that has left its bridge, or whose MTU changed: noticed and put right.

Decides when a card may be put back: when it is still the switch's card, nothing else has taken it, and the host does
not use it for itself, because its addresses would stop working. A look reads two or three files of sysfs, and is not a
fault while a command makes or deletes the switch. Must not know who looks, nor how often (`watching`).

`INV-CARD-BACK`: while a machine is on an external switch, a card that was taken out of its bridge is back within a
second, unless the host uses it; then there is an event that says why it is not.
"""

from __future__ import annotations

import os

from vmm.model import errors
from vmm.net import cards, plan
from vmm.net.host_side import HostSide
from vmm.net.switch_spec import USUAL_MTU_BYTES

_ROOT = "/sys/class/net"


def problem(host: HostSide) -> str | None:
    """Why no frame gets through the switch's card, for people; None where nothing is wrong. Changes nothing."""
    spec = host.spec
    if not _is_watched(host) or _master(str(spec.uplink)) == spec.bridge_name:
        return None
    try:
        card = str(cards.found(spec).uplink)  # it may have another name now
    except errors.Unsupported as error:
        return _unless_changing(host, error.problem)
    master = _master(card)
    if master == spec.bridge_name:
        return None
    if not os.path.isdir(f"{_ROOT}/{card}"):
        return _unless_changing(host, f"its network card {card} is not there")
    where = f"is part of {master}" if master else "was taken out"
    return _unless_changing(host, f"its network card {card} {where}: it is not part of its bridge {spec.bridge_name}")


def put_back(host: HostSide) -> None:
    """Make the card part of the bridge again. The caller holds the switch's lock.

    Raises VmmError where that is not safe, with what to do.
    """
    from vmm.net import ipv6
    from vmm.net.bridge import Kernel

    spec = cards.found(host.spec)
    card = str(spec.uplink)
    with Kernel() as kernel:
        facts = kernel.facts(spec)
        if reasons := plan.refusals(spec, facts):
            raise errors.Unsupported("; ".join(reasons))
        if facts.uplink is not None and facts.uplink.addresses:
            found = ", ".join(one.address for one in facts.uplink.addresses)
            raise errors.InUse(f"this host uses {card} itself ({found})", hint=f"first: ip addr flush dev {card}")
        ipv6.switch_off(card)
        kernel.set_master(card, spec.bridge_name)
        if os.path.exists(f"{_ROOT}/{spec.bridge_name}/bridge/vlan_filtering"):
            kernel.set_vlans(card, *plan.uplink_vlans())
        kernel.set_up(card)


def mtu_problem(host: HostSide) -> str | None:
    """How the MTU of bridge or taps differs from what the switch is to carry; None where it does not. Changes nothing.

    Of the taps one is looked at: all of them are set together, and there may be hundreds.
    """
    spec = host.spec
    if not os.path.isdir(f"{_ROOT}/{spec.bridge_name}/brif"):
        return None
    if spec.uplink is not None and cards.mtu_bytes(spec.uplink) is None:
        return None  # of a card that is not there nothing is known
    wanted = host.mtu_bytes() or USUAL_MTU_BYTES
    taps = sorted(name for name in _ports(spec.bridge_name) if name != spec.uplink)
    for name in (spec.bridge_name, *taps[:1]):
        there = cards.mtu_bytes(name)
        if there not in (None, wanted):
            words = f"bridge and taps carry {there} bytes (MTU), and they are to carry {wanted}"
            return _unless_changing(host, words)
    if spec.mtu_bytes is not None and wanted < spec.mtu_bytes:
        words = f"{spec.uplink} carries {wanted} bytes (MTU), and so does the switch, instead of {spec.mtu_bytes}"
        return _unless_changing(host, f"{words}: ip link set {spec.uplink} mtu {spec.mtu_bytes}")
    return None


def _ports(bridge: str) -> list[str]:
    try:
        return os.listdir(f"{_ROOT}/{bridge}/brif")
    except OSError:
        return []


def _is_watched(host: HostSide) -> bool:
    spec = host.spec
    return spec.type == "external" and spec.capabilities.in_kernel and os.path.isdir(f"{_ROOT}/{spec.bridge_name}")


def _unless_changing(host: HostSide, words: str) -> str | None:
    """Nothing while the switch is being made or taken back."""
    return None if host.bridge.is_half_done() else words


def _master(name: str) -> str | None:
    try:
        return os.path.basename(os.readlink(f"{_ROOT}/{name}/master"))
    except OSError:
        return None
