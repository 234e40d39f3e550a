# SPDX-License-Identifier: Apache-2.0
"""Facts about the guest, as values: heartbeat, operating system, addresses, exchanged items.

Decides their shape in Python, on the control socket and in JSON. Must not know how a guest is queried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

HeartbeatState = Literal["off", "no contact", "ok", "lost"]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Whether the guest is alive, according to its agent. `seen_seconds_ago` is None before the first contact."""

    state: HeartbeatState
    seen_seconds_ago: float | None = None


@dataclass(frozen=True, slots=True)
class OsInfo:
    """The guest's operating system, as the guest reports it; empty strings for what it does not report."""

    name: str
    version: str
    kernel: str
    machine: str
    host_name: str


@dataclass(frozen=True, slots=True)
class GuestInterface:
    """A network interface in the guest. `addresses` are "10.0.0.5/24" or "fe80::1/64"."""

    name: str
    mac: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """What the guest agent reports. `os` is None, and `interfaces` is empty, until the guest has reported them."""

    heartbeat: HeartbeatState
    seen_seconds_ago: float | None
    os: OsInfo | None
    interfaces: tuple[GuestInterface, ...]

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> GuestInfo:
        """Parse a worker's answer. Raises ValueError, KeyError, TypeError for anything else."""
        interfaces = (
            GuestInterface(str(one["name"]), str(one["mac"]), tuple(map(str, one["addresses"])))
            for one in document["interfaces"]
        )
        system = document["os"]
        return cls(
            document["heartbeat"], document["seen_seconds_ago"], None if system is None else OsInfo(**system),
            tuple(interfaces),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExchangedItem:
    """A value exchanged between guest and host. `pool` says which of them set it: "guest" or "host"."""

    value: str
    pool: str
