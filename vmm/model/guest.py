# SPDX-License-Identifier: Apache-2.0
"""What is known about the inside of a machine, as values: heartbeat, system, addresses, exchanged items.

Decides their shape, on the control socket and in JSON, too. Must not know how a guest is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

HeartbeatState = Literal["off", "no contact", "ok", "lost"]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Whether the guest is alive, as its agent shows. `seen_seconds_ago` is None before the first contact."""

    state: HeartbeatState
    seen_seconds_ago: float | None = None


@dataclass(frozen=True, slots=True)
class OsInfo:
    """What runs in the guest, in its own words. Empty where it does not say."""

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
    """What a guest's agent says. `os` is None, and `interfaces` are empty, where the guest has not said it yet."""

    heartbeat: HeartbeatState
    seen_seconds_ago: float | None
    os: OsInfo | None
    interfaces: tuple[GuestInterface, ...]

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> GuestInfo:
        """Out of what a worker answered. Raises ValueError, KeyError, TypeError for anything else."""
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
    """A value that guest and host exchange, and which of the two set it: "guest" or "host"."""

    value: str
    pool: str
