# SPDX-License-Identifier: Apache-2.0
"""What of a switch should be on the running host and is not, and putting it right.

Decides what is looked at, which each machine on the switch does every second and people do with `switch show` and
`doctor`: so a look costs next to nothing and changes nothing. What is wrong is put right under the switch's lock,
after another look, so that of many who see it one does it. What does not start, or dies again and again, is tried ever
more rarely, and told once. Must not know machines, nor who is told.

    FOLDER/dhcp-tries.json   {"boot_id": ..., "count": 3, "at": seconds since boot}

`INV-SWITCH-WATCHED`: while a machine is on a switch, what of it dies is back a second later, and told.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

from vmm.model import errors, paths
from vmm.net import rule_watch, settings, switches
from vmm.net.dhcp import DhcpServer
from vmm.net.host_side import HostSide

MAX_PAUSE_SECONDS = 60.0  # between two tries
_TRIES_NAME = "dhcp-tries.json"


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was put right, in words for programs; `failed`: what could not be, the first time that it was tried."""

    mended: tuple[str, ...] = ()
    failed: tuple[Fault, ...] = ()


def put_right(host: HostSide) -> Outcome:
    """Put right what is wrong with a bridge. Raises VmmError.

    The process of a `user` switch looks after its gateway itself.
    """
    if host.spec.backend != "bridge":
        return Outcome()
    if host.spec.type == "internal" and host.spec.dhcp:
        _dhcp(host).refresh()
    if rule_watch.is_verified(host) and (not _dead(host) or _Tries(host).are_over_for_now()):
        return Outcome()
    with switches.staying(host.spec.name) as current, current.changing():
        if current.spec.id != host.spec.id:
            return Outcome()
        mended = ["rules"] if rule_watch.restore(current) else []
        failed: list[Fault] = []
        if _dead(current) and not _Tries(current).are_over_for_now():
            failed = _start_dhcp(current)
            mended += [] if _dead(current) else ["dhcp"]
    return Outcome(tuple(mended), tuple(failed))


def _start_dhcp(host: HostSide) -> list[Fault]:
    """Start it; what is to be told where that fails."""
    is_first = _Tries(host).add() == 1
    try:
        _dhcp(host).ensure()
    except errors.VmmError as error:
        problem = f"its DHCP and name server (dnsmasq) cannot be started, and is tried again: {error.problem}"
        return [Fault("dhcp", problem)] if is_first else []
    return []


class _Tries:
    """How often and when a switch's DHCP server was started again lately."""

    def __init__(self, host: HostSide) -> None:
        self._path = os.path.join(host.folder, _TRIES_NAME)
        self._now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._count, self._at = 0, self._now
        try:
            with open(self._path, encoding="utf-8") as file:
                document = json.load(file)
            if document["boot_id"] == settings.boot_id():
                count, at = int(document["count"]), float(document["at"])
                if count > 0 and 0 <= self._now - at < 2 * MAX_PAUSE_SECONDS:
                    self._count, self._at = count, at
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            pass

    def are_over_for_now(self) -> bool:
        """True while another try would come too soon after the last."""
        pause = min(2.0 ** min(self._count - 1, 10), MAX_PAUSE_SECONDS)
        return self._count > 0 and self._now - self._at < pause

    def add(self) -> int:
        """Another try begins now; how many there were with it."""
        document = {"boot_id": settings.boot_id(), "count": self._count + 1, "at": self._now}
        paths.write_whole(self._path, json.dumps(document).encode(), durable=False)
        return self._count + 1


def _is_there(host: HostSide) -> bool:
    return os.path.isdir(f"/sys/class/net/{host.spec.bridge_name}")


def _dhcp(host: HostSide) -> DhcpServer:
    return DhcpServer(host.spec, host.folder, host.lease_path)
