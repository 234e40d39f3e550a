# SPDX-License-Identifier: Apache-2.0
"""The file in which both back ends keep the leases of an internal switch.

Decides its form, which is dnsmasq's (one line per lease: its end in seconds since 1970, MAC, address, name or *, the
client's id or *), because dnsmasq writes the file of the bridge back end; and that any other line is skipped, because
the writer is a process that guests talk to. Light: the process of a `user` switch imports it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
from typing import Any

from vmm.model import paths
from vmm.net import frames
from vmm.net.dhcp_message import text
from vmm.net.dhcp_server import SAVE_AGAIN, ClientRecord, DhcpServer

MAX_FILE_BYTES = 1 << 20


def read(path: str) -> list[dict[str, Any]]:
    """The present and former leases: mac, address, name, expires (seconds since 1970)."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError), open(path, "rb", opener=_unlinked) as file:
        for line in file.read(MAX_FILE_BYTES).decode("ascii", "replace").splitlines():
            words = line.split()
            if len(words) < 4 or not words[0].isdecimal() or len(words[0]) > 12:
                continue
            with contextlib.suppress(ValueError):
                mac = frames.format_mac(frames.parse_mac(words[1]))
                address = str(ipaddress.IPv4Address(words[2]))
                name = None if words[3] == "*" else words[3]
                found.append({"mac": mac, "address": address, "name": name, "expires": int(words[0])})
    return found


def _unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def records(path: str, now: float, lease_seconds: int) -> list[tuple[bytes, ClientRecord]]:
    """The records that `write` wrote. None ends later than a lease assigned now would: the clock may have been wrong.

    Each is held for as long as a renewal that was not worth a write may have extended it.
    """
    found = []
    for one in read(path):
        expires = min(float(one["expires"]), now + lease_seconds)
        held_until = expires + lease_seconds / SAVE_AGAIN
        address = int(ipaddress.IPv4Address(one["address"]))
        record = ClientRecord(address, expires, held_until, one["name"] or "", saved=expires)
        found.append((frames.parse_mac(one["mac"]), record))
    return found


def write(path: str, server: DhcpServer) -> None:
    """Write a server's leases. Raises OSError, VmmError."""
    lines = []
    for mac, one in server.leases():
        address = text(one.address.to_bytes(4, "big"))
        lines.append(f"{math.ceil(one.expires)} {frames.format_mac(mac)} {address} {one.name or '*'} *\n")
    paths.write_whole(path, "".join(lines).encode(), durable=False)
