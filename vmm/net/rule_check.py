# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel has the rules of a switch that it was given, and the differences, in words.

Decides how a rule is recognized: its comment is the digest of what it was made from, because nft prints a rule in
other words than it was given. A program that writes a rule with another one's comment is not detected, but only root
can do that. Also decides how a check finds that nothing changed at all: the kernel increments a number with every
change of any rule (NFT_MSG_GETGEN of nf_tables.h). Changes nothing.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vmm.model import errors
from vmm.net import nft
from vmm.net.nft import GuestPort
from vmm.net.switch_spec import SwitchSpec

_NETFILTER, _GET_GENERATION, _GENERATION_ID = 12, 10 << 8 | 16, 1
_REQUEST = struct.pack("=IHHII", 20, _GET_GENERATION, 1, 0, 0) + bytes(4)  # nlmsghdr with NLM_F_REQUEST, nfgenmsg
_HEADERS_BYTES, _ERROR = 20, 2
_SECONDS = 5.0
_ORDER = sys.byteorder
_HOOKED = ("type", "hook", "prio", "policy")

Place = tuple[str, str]  # family, table


@dataclass(slots=True)
class _Table:
    facts: dict[str, Any] = field(default_factory=dict)
    chains: dict[str, dict[str, Any]] = field(default_factory=dict)
    rules: dict[str, list[str]] = field(default_factory=dict)


def differences(spec: SwitchSpec, ports: Sequence[GuestPort]) -> list[str]:
    """The differences between the switch's rules, with these ports, and those in the kernel; empty if all is as
    planned.

    Raises Unsupported, VmmError.
    """
    found: list[str] = []
    for place, planned in _planned(nft.document(spec, ports)).items():
        present = _present(*place)
        found += [f"table {' '.join(place)}: {words}" for words in _compared(planned, present)]
    return found


def _compared(planned: _Table, present: _Table | None) -> Iterator[str]:
    if present is None:
        yield "is gone"
        return
    if present.facts.get("flags"):
        yield "is switched off"  # dormant; nft 1.0.6 spells the flags wrong in JSON
    for name, facts in planned.chains.items():
        other = present.chains.get(name)
        if other is None:
            yield f"chain {name} is gone"
        elif any(facts.get(key) != other.get(key) for key in _HOOKED):
            yield f"chain {name} has been replaced"
        else:
            ours, theirs = planned.rules.get(name, []), present.rules.get(name, [])
            if missing := (Counter(ours) - Counter(theirs)).total():
                yield f"chain {name} lacks {missing} of its {len(ours)} rules"
            if foreign := (Counter(theirs) - Counter(ours)).total():
                yield f"chain {name} has {foreign} that {'does' if foreign == 1 else 'do'} not belong to the switch"
            if ours != theirs and not missing and not foreign:
                yield f"the rules of chain {name} are in another order"


def _planned(document: dict[str, Any]) -> dict[Place, _Table]:
    """The tables that exist once the kernel has applied a document."""
    tables: dict[Place, _Table] = {}
    for command in document["nftables"]:
        ((verb, what),) = command.items()
        ((kind, facts),) = what.items()
        if kind == "table" and verb == "delete":
            tables.pop((facts["family"], facts["name"]), None)
        elif verb == "add":
            _note(tables, kind, facts)
    return tables


def _present(family: str, table: str) -> _Table | None:
    tables: dict[Place, _Table] = {}
    for kind, facts in nft.listed(family, table):
        _note(tables, kind, facts)
    return tables.get((family, table))


def _note(tables: dict[Place, _Table], kind: str, facts: dict[str, Any]) -> None:
    if kind == "table":
        tables.setdefault((facts["family"], facts["name"]), _Table()).facts = facts
    elif kind == "chain":
        chains = tables[facts["family"], facts["table"]].chains
        chains[facts["name"]] = {**chains.get(facts["name"], {}), **facts}
    elif kind == "rule":
        rules = tables[facts["family"], facts["table"]].rules
        rules.setdefault(facts["chain"], []).append(str(facts.get("comment", "")))


def generation() -> int:
    """A number that changes with every change of any nftables rule of this network namespace. Raises VmmError."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER) as netlink:
            netlink.settimeout(_SECONDS)
            netlink.sendto(_REQUEST, (0, 0))
            answer = netlink.recv(4096)
    except OSError as error:
        raise errors.of_os_error(error, "ask for the state of nftables") from error
    if int.from_bytes(answer[4:6], _ORDER) == _ERROR:
        raise errors.VmmError("the kernel does not report the state of nftables")
    at = _HEADERS_BYTES
    while at + 8 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == _GENERATION_ID:
            return int.from_bytes(answer[at + 4 : at + 8], "big")
        at += max(4, (length + 3) & ~3)
    raise errors.VmmError("the kernel does not report the state of nftables")
