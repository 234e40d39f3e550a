# SPDX-License-Identifier: Apache-2.0
"""A port of a `user` switch, as it is sent to the switch and kept for its restart. Pure.

Decides the encoding (JSON) and that a document from outside is complete and within the limits. Plain dataclasses and
not pydantic, because the switch process must start in milliseconds. Must not know adapters or machines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vmm.model import errors
from vmm.net import frames
from vmm.net.engine import PortRules, VlanMode

MAX_NAME_CHARACTERS = 64
MAX_PORT_MACS = 64
MAX_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True, slots=True)
class PortSetup:
    """`address` is the switch's socket of this port, `peer` the other side's; `owner` may send to `address`."""

    name: str
    address: str
    peer: str
    rules: PortRules = field(default_factory=PortRules)
    rate_bits_per_second: int = 0  # what may be sent; 0: no limit
    owner: int | None = None  # a user id
    link_up: bool = True


def to_document(setup: PortSetup) -> dict[str, Any]:
    """As JSON."""
    rules = setup.rules
    return {
        "name": setup.name,
        "address": setup.address,
        "peer": setup.peer,
        "rate_bits_per_second": setup.rate_bits_per_second,
        "owner": setup.owner,
        "link_up": setup.link_up,
        "macs": sorted(frames.format_mac(one) for one in rules.addresses),
        "spoofing": rules.spoofing,
        "mode": rules.mode.value,
        "vlan": rules.vlan,
        "allowed": sorted(rules.allowed),
        "dhcp_guard": rules.dhcp_guard,
        "router_guard": rules.router_guard,
        "storm_frames_per_second": rules.storm_frames_per_second,
        "mirror_source": rules.mirror_source,
        "mirror_destination": rules.mirror_destination,
    }


def from_document(document: object) -> PortSetup:
    """Parse what `to_document` wrote; an omitted key has its default. Raises InvalidSpec for anything else."""
    if not isinstance(document, Mapping):
        raise errors.InvalidSpec("a port must be a JSON object")
    known = set(to_document(PortSetup("", "", "")))
    if unknown := sorted(map(repr, set(document) - known)):
        raise errors.InvalidSpec(f"a port has no setting {unknown[0][:80]}")
    macs = _list(document, "macs", str)
    if len(macs) > MAX_PORT_MACS:
        raise errors.InvalidSpec(f"a port can have at most {MAX_PORT_MACS} addresses")
    try:
        rules = PortRules(
            addresses=frozenset(frames.parse_mac(one) for one in macs),
            spoofing=_flag(document, "spoofing"),
            mode=VlanMode(document.get("mode", "untagged")),
            vlan=_number(document, "vlan", frames.MAX_VLAN),
            allowed=frozenset(_list(document, "allowed", int)),
            dhcp_guard=_flag(document, "dhcp_guard"),
            router_guard=_flag(document, "router_guard"),
            storm_frames_per_second=_number(document, "storm_frames_per_second", 10**9),
            mirror_source=_flag(document, "mirror_source"),
            mirror_destination=_flag(document, "mirror_destination"),
        )
    except ValueError as error:
        raise errors.InvalidSpec(str(error)) from error
    if any(not 1 <= vlan <= frames.MAX_VLAN for vlan in rules.allowed):
        raise errors.InvalidSpec(f"VLANs must be from 1 to {frames.MAX_VLAN}")
    owner = document.get("owner")
    return PortSetup(
        name=_text(document, "name", MAX_NAME_CHARACTERS),
        address=_text(document, "address", MAX_SOCKET_PATH_BYTES),
        peer=_text(document, "peer", MAX_SOCKET_PATH_BYTES),
        rules=rules,
        rate_bits_per_second=_number(document, "rate_bits_per_second", 10**12),
        owner=None if owner is None else _number(document, "owner", 2**32 - 2),
        link_up=_flag(document, "link_up", True),
    )


def _text(document: Mapping[str, Any], key: str, limit: int) -> str:
    value = document.get(key)
    # A lone surrogate, which JSON can express, is not a character.
    is_text = isinstance(value, str) and 0 < len(value.encode(errors="replace")) <= limit
    if not isinstance(value, str) or not is_text or re.search("[\0\ud800-\udfff]", value):
        raise errors.InvalidSpec(f"a port's {key} must be a string of 1 to {limit} bytes")
    return value


def _flag(document: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = document.get(key, default)
    if not isinstance(value, bool):
        raise errors.InvalidSpec(f"a port's {key} must be true or false")
    return value


def _number(document: Mapping[str, Any], key: str, limit: int) -> int:
    value = document.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise errors.InvalidSpec(f"a port's {key} must be a number from 0 to {limit}")
    return value


def _list(document: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = document.get(key, [])
    if not isinstance(value, list) or not all(type(one) is kind for one in value):
        raise errors.InvalidSpec(f"a port's {key} must be a list")
    return value
