# SPDX-License-Identifier: Apache-2.0
"""Bandwidth limits on the bridge back end: what a tap sends waits in a queue that empties at the limit's rate.

Decides how fast and how long that queue is. Frames that arrive at a tap are led (`nft`: `fwd to`) to an interface of
kind ifb, whose queue is a token bucket filter (tc-tbf(8)), and continue from there as if they had just arrived at the
tap. nftables' own limit is not suitable: its byte bucket holds a whole second in addition to the burst (nft_limit.c).
A limit that stays the same is not touched, so that no command refills its bucket. Together with `bridge` the only
module that uses pyroute2. Must not know rules, nor when a limit changes.

    guest ── tap ─┐             ┌─> bridge
                  └─> ifb: tbf ─┘
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmm.model import errors
from vmm.net import frames
from vmm.net.bridge import refused
from vmm.net.nft import shaper_name
from vmm.net.switch_spec import SwitchSpec

BURST_SECONDS = 0.01  # and at least two whole frames
QUEUE_SECONDS = 0.1  # what waits longer is lost, which is how TCP notices the limit
MIN_QUEUE_BYTES = 16 << 10
HINT = "modprobe -a ifb sch_tbf nft_fwd_netdev"
_ALIAS = "vmm bandwidth limit of "
_SHAPER = re.compile(r"vb[0-9a-f]{12}")
_UNKNOWN = (errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL)


def ensure(spec: SwitchSpec, rates: Mapping[str, int]) -> frozenset[str]:
    """Give each tap a queue with its rate, in bits per second; returns the taps that exist.

    Raises Unsupported if the kernel has no such queues.
    """
    there = set()
    with IPRoute() as netlink:
        for interface, rate in rates.items():
            try:
                if found := netlink.link_lookup(ifname=interface):
                    mtu_bytes = netlink.get_links(found[0])[0].get_attr("IFLA_MTU")
                    _ensure(netlink, spec, shaper_name(interface), rate // 8, mtu_bytes)
                    there.add(interface)
            except NetlinkError as error:
                if error.code == errno.ENODEV:  # its guest is off by now
                    continue
                if error.code in _UNKNOWN:
                    raise errors.Unsupported("this kernel cannot limit bandwidth", hint=HINT) from error
                raise refused(error, f"limit the bandwidth of {interface}") from error
    return frozenset(there)


def _ensure(netlink: IPRoute, spec: SwitchSpec, name: str, bytes_per_second: int, mtu_bytes: int) -> None:
    found = netlink.link_lookup(ifname=name)
    if not found:
        netlink.link("add", ifname=name, kind="ifb")
        found = netlink.link_lookup(ifname=name)
    index = found[0]
    link = netlink.get_links(index)[0]
    if link.get_attr("IFLA_IFALIAS") != _ALIAS + spec.id:  # its creator was killed, or the tap had another switch
        netlink.link("set", index=index, ifalias=_ALIAS + spec.id)
    has_mtu = link.get_attr("IFLA_MTU") == mtu_bytes
    if not has_mtu or _rate(netlink, index) != bytes_per_second:
        burst = max(2 * (mtu_bytes + frames.HEADER_BYTES + frames.TAG_BYTES), int(bytes_per_second * BURST_SECONDS))
        limit = max(MIN_QUEUE_BYTES, int(bytes_per_second * QUEUE_SECONDS)) + burst
        netlink.tc("replace", "tbf", index=index, rate=bytes_per_second, burst=burst, limit=limit)
    netlink.link("set", index=index, mtu=mtu_bytes, state="up")  # its MTU only records which one the queue is for


def _rate(netlink: IPRoute, index: int) -> int | None:
    """The rate of an existing queue in bytes per second."""
    for message in _queues(netlink, index):
        options = message.get_attr("TCA_OPTIONS")
        parameters = None if options is None else options.get_attr("TCA_TBF_PARMS")
        if parameters is not None:
            return int(parameters["rate"])
    return None


def _queues(netlink: IPRoute, index: int) -> Iterator[Any]:
    for message in netlink.get_qdiscs(index=index):
        if message.get_attr("TCA_KIND") == "tbf":
            yield message


def drop_others(spec: SwitchSpec, interfaces: Mapping[str, object]) -> None:
    """Remove the switch's queues of other taps; succeeds if there are none."""
    kept = {shaper_name(one) for one in interfaces}
    with IPRoute() as netlink:
        for message in netlink.get_links(kind="ifb"):
            name, alias = message.get_attr("IFLA_IFNAME"), message.get_attr("IFLA_IFALIAS")
            if name not in kept and (alias == _ALIAS + spec.id or (not alias and _is_orphan(netlink, name))):
                try:
                    netlink.link("del", index=message["index"])
                except NetlinkError as error:
                    if error.code != errno.ENODEV:
                        raise refused(error, "end a bandwidth limit") from error


def _is_orphan(netlink: IPRoute, name: str) -> bool:
    """True for a queue whose creator was killed before it recorded the tap, and whose tap is gone, too."""
    return _SHAPER.fullmatch(name) is not None and not netlink.link_lookup(ifname="vt" + name.removeprefix("vb"))


def drops(spec: SwitchSpec) -> dict[str, int]:
    """Frames dropped because the queue was full: the tap's name -> how many."""
    found = {}
    with IPRoute() as netlink:
        for link in netlink.get_links(kind="ifb"):
            if link.get_attr("IFLA_IFALIAS") != _ALIAS + spec.id:
                continue
            for message in _queues(netlink, link["index"]):
                statistics = message.get_attr("TCA_STATS")
                name = link.get_attr("IFLA_IFNAME")
                if statistics is not None and statistics["drop"]:
                    found["vt" + name.removeprefix("vb")] = int(statistics["drop"])
    return found
