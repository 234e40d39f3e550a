# SPDX-License-Identifier: Apache-2.0
"""Parts of a switch that should be on the running host and are missing, and their repair.

Decides what is checked. Each machine on the switch checks every second, and users do with `switch show` and `doctor`,
so a check costs next to nothing and changes nothing. Faults are repaired under the switch's lock, after another check,
so that only one of several processes that find a fault repairs it. What fails to start, or dies repeatedly, is tried
less and less often, and reported once. Must not know machines, nor who receives the reports.

    FOLDER/dhcp-tries.json, card-tries.json   {"boot_id": ..., "count": 3, "at": seconds since boot, "problem": ...}

`INV-SWITCH-WATCHED`: while a machine is on a switch, any part of the switch that dies is back a second later, with an
event.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import time
from dataclasses import dataclass

from vmm.model import errors, paths
from vmm.net import card_watch, gateway_note, records, rule_watch, settings, switches
from vmm.net.dhcp import Dnsmasq
from vmm.net.gateway import problem_of
from vmm.net.host_side import HostSide

MAX_PAUSE_SECONDS = 60.0  # between two attempts


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that differs from the switch's file: a word for programs, and a sentence for people."""

    what: str
    problem: str


def faults(host: HostSide) -> list[Fault]:
    """Everything that is wrong with a switch that is on the host; empty for one that is not. Raises VmmError."""
    if host.spec.capabilities.in_kernel and host.bridge.is_unfinished():
        words = "a command that created or deleted it was killed: a machine that starts on it completes it"
        return [Fault("unfinished", f"{words}, and vmm switch delete {host.spec.name} restores this host")]
    found = [*_dead(host), *_of_the_card(host), *_routes(host)]
    if wrong := rule_watch.differences(host):
        found.append(Fault("rules", f"its nftables rules are not as planned: {'; '.join(wrong)}"))
    if host.spec.capabilities.in_kernel:
        words = "so the guest on that port cannot send; remove the file, and the machine writes it again"
        found += [Fault("port", f"{damage}, {words}") for damage in host.bridge.damaged_ports()]
    return found


def _dead(host: HostSide) -> list[Fault]:
    """Processes that should run and do not."""
    spec = host.spec
    if spec.capabilities.gateway:
        gateway = (host.user.status() or {}).get("gateway")  # queried for every type: a process that hangs is an error
        if gateway is None or gateway["running"]:
            return []
        return [Fault("gateway", f"its gateway does not run: {problem_of(str(gateway['said']))}")]
    if spec.type != "internal":
        return []
    if spec.dhcp and _is_there(host) and _dhcp(host).process() is None:
        return [Fault("dhcp", "its DHCP and name server (dnsmasq) does not run")]
    return []


def _of_the_card(host: HostSide) -> list[Fault]:
    """Faults of an external switch's card, and of the MTU that a bridge takes from it."""
    found = (("card", card_watch.problem(host)), ("mtu", card_watch.mtu_problem(host)))
    return [Fault(what, problem) for what, problem in found if problem is not None]


def _routes(host: HostSide) -> list[Fault]:
    """Routes into a part of an internal network that others added since, such as a VPN: being narrower, they win."""
    from vmm.net.bridge import Kernel

    spec = host.spec
    if spec.type != "internal" or not spec.capabilities.in_kernel or not _is_there(host):
        return []
    with Kernel() as kernel:
        routed = [ipaddress.IPv4Network(one) for one in kernel.routed(spec.bridge_name)]
    taken = [one for one in routed if one.prefixlen > spec.network.prefixlen and one.subnet_of(spec.network)]
    if not taken:
        return []
    words = f"this host's route to {', '.join(map(str, taken))} takes a part of its network {spec.network}"
    return [
        Fault(
            "route",
            f"{words}, whose guests get no answers: remove the route, or create the switch with another --address",
        )
    ]


def gateway_problem(host: HostSide) -> str | None:
    """Why the gateway of a `user` switch does not run, as the switch noted it; None while it does."""
    if not host.spec.capabilities.gateway or host.spec.type != "internal":
        return None
    return gateway_note.read(host.folder)


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What was repaired, in words for programs; `failed`: what could not be, reported at the first failure."""

    mended: tuple[str, ...] = ()
    failed: tuple[Fault, ...] = ()


def put_right(host: HostSide) -> RepairResult:
    """Repair what is wrong with a bridge. Raises VmmError.

    The process of a `user` switch keeps its gateway running by itself.
    """
    if not host.spec.capabilities.in_kernel:
        return RepairResult()
    if host.spec.type == "internal" and host.spec.dhcp:
        _dhcp(host).refresh()
    if rule_watch.is_verified(host) and not _to_do(host):
        return RepairResult()
    with switches.staying(host.spec.name) as current, current.bridge.changing():
        if current.spec.id != host.spec.id:
            return RepairResult()
        mended = ["rules"] if rule_watch.restore(current) else []
        failed: list[Fault] = []
        for what in _to_do(current):  # another check
            failures = _TODO[what](current)
            failed += failures
            if not _is_wrong(current, what):
                mended.append(what)
    return RepairResult(tuple(mended), tuple(failed))


def _to_do(host: HostSide) -> list[str]:
    """What is wrong, except faults for which another attempt would come too soon."""
    wrong = [fault.what for fault in (*_dead(host), *_of_the_card(host))]
    return [what for what in wrong if not _Tries(host, what).are_over_for_now()]


def _is_wrong(host: HostSide, what: str) -> bool:
    return any(fault.what == what for fault in (*_dead(host), *_of_the_card(host)))


def _start_dhcp(host: HostSide) -> list[Fault]:
    """Start it; returns what to report if that fails."""
    is_first = _Tries(host, "dhcp").add() == 1
    try:
        _dhcp(host).ensure()
    except errors.VmmError as error:
        problem = f"its DHCP and name server (dnsmasq) cannot be started, and will be tried again: {error.problem}"
        return [Fault("dhcp", problem)] if is_first else []
    return []


def _put_card_back(host: HostSide) -> list[Fault]:
    """Put it back; returns what to report if that is not possible, once for each reason."""
    wrong, tries = card_watch.problem(host), _Tries(host, "card")
    try:
        card_watch.put_back(host)
    except errors.VmmError as error:
        hint = "" if error.hint is None else f"; {error.hint}"
        problem = f"{wrong}, and it is not put back: {error.problem}{hint}"
        is_new = problem != tries.problem
        tries.add(problem)
        return [Fault("card", problem)] if is_new else []
    tries.add()
    return []


def _follow_mtu(host: HostSide) -> list[Fault]:
    """Have bridge and taps follow; returns what to report if that fails, once for each reason."""
    tries = _Tries(host, "mtu")
    try:
        host.bridge.follow_mtu()
        problem = card_watch.mtu_problem(host)
    except errors.VmmError as error:
        problem = f"its MTU cannot be set, and is tried again: {error.problem}"
    is_new = problem != tries.problem
    tries.add(problem)
    return [Fault("mtu", problem)] if problem is not None and is_new else []


_TODO = {"dhcp": _start_dhcp, "card": _put_card_back, "mtu": _follow_mtu}


class _Tries:
    """How often and when a part of a switch was repaired recently, and the last `problem` with that."""

    def __init__(self, host: HostSide, what: str) -> None:
        self._path = os.path.join(host.folder, f"{what}-tries.json")
        self._now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._count, self._at = 0, self._now
        self.problem: str | None = None
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, ArithmeticError):
            document = records.read_object(self._path)
            if document["boot_id"] == settings.boot_id():
                count, at = int(document["count"]), float(document["at"])
                if count > 0 and 0 <= self._now - at < 2 * MAX_PAUSE_SECONDS:
                    self._count, self._at = count, at
                    problem = document.get("problem")
                    self.problem = problem if isinstance(problem, str) else None

    def are_over_for_now(self) -> bool:
        """True while another attempt would come too soon after the last."""
        pause = min(2.0 ** min(self._count - 1, 10), MAX_PAUSE_SECONDS)
        return self._count > 0 and self._now - self._at < pause

    def add(self, problem: str | None = None) -> int:
        """Record that another attempt begins now, or ended with this problem; returns the number of attempts."""
        document = {"boot_id": settings.boot_id(), "count": self._count + 1, "at": self._now, "problem": problem}
        paths.write_whole(self._path, json.dumps(document).encode(), durable=False)
        return self._count + 1


def _is_there(host: HostSide) -> bool:
    return os.path.isdir(f"/sys/class/net/{host.spec.bridge_name}")


def _dhcp(host: HostSide) -> Dnsmasq:
    return Dnsmasq(host.spec, host.folder, host.lease_path)
