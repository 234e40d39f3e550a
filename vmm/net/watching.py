# SPDX-License-Identifier: Apache-2.0
"""What of a switch should be on the running host and is not, and putting it right.

Decides what is looked at, which each machine on the switch does every second and people do with `switch show` and
`doctor`: so a look costs next to nothing and changes nothing. What is wrong is put right under the switch's lock,
after another look, so that of many who see it one does it. Must not know machines, nor who is told.

`INV-SWITCH-WATCHED`: while a machine is on a switch, what of it dies is back a second later, and told.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vmm.net import rule_watch, switches
from vmm.net.dhcp import DhcpServer
from vmm.net.switches import HostSide


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as the switch's file wants it: a word for programs, and a sentence for people."""

    what: str
    problem: str


def faults(host: HostSide) -> list[Fault]:
    """All that is wrong with a switch that is on the host; nothing for one that is not. Raises VmmError."""
    found = _dead(host)
    if wrong := rule_watch.differences(host):
        found.append(Fault("rules", f"its nftables rules are not as planned: {'; '.join(wrong)}"))
    return found


def _dead(host: HostSide) -> list[Fault]:
    """What should run and does not."""
    spec = host.spec
    if spec.type != "internal":
        return []
    if spec.backend == "user":
        gateway = (host.user.status() or {}).get("gateway")
        if gateway is None or gateway["running"]:
            return []
        return [Fault("gateway", f"its gateway does not run: {gateway['said'] or 'it says nothing'}")]
    if spec.dhcp and _is_there(host) and _dhcp(host).process() is None:
        return [Fault("dhcp", "its DHCP and name server (dnsmasq) does not run")]
    return []


def put_right(host: HostSide) -> list[str]:
    """Put right what is wrong with a bridge; what that was. Raises VmmError.

    The process of a `user` switch looks after its gateway itself.
    """
    if host.spec.backend != "bridge":
        return []
    if host.spec.type == "internal" and host.spec.dhcp:
        _dhcp(host).refresh()
    if not _dead(host) and rule_watch.is_verified(host):
        return []
    with switches.staying(host.spec.name) as current, current.changing():
        if current.spec.id != host.spec.id:
            return []
        mended = ["rules"] if rule_watch.restore(current) else []
        for one in _dead(current):
            if one.what == "dhcp":
                _dhcp(current).ensure()
            mended.append(one.what)
    return mended


def _is_there(host: HostSide) -> bool:
    return os.path.isdir(f"/sys/class/net/{host.spec.bridge_name}")


def _dhcp(host: HostSide) -> DhcpServer:
    return DhcpServer(host.spec, host.folder, switches.lease_path(host.spec))
