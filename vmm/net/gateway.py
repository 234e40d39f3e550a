# SPDX-License-Identifier: Apache-2.0
"""The way out of an internal switch without privileges: QEMU's user-mode network (slirp) on a port of the switch.

Decides how that helper is started: a QEMU without a machine, only with its user-mode network and a datagram socket,
joined by a hub. It answers guests' DNS requests, reaches the host (at `host`) and whatever the host reaches, and
forwards ports of the host to guests. It also answers DHCP, which is not wanted: the switch does that, and drops the
helper's answers. It cannot carry connections from the host to a guest except through a forwarded port; the `bridge`
back end can. Must not know switches or frames. How it is started and kept running: `gateway_process`.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vmm.model import errors

QEMU = "qemu-system-x86_64"
PORT_NAME = "gateway"
MAX_FORWARDS = 64
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class GatewaySetup:
    """The settings of a gateway. `network` is written as 10.0.7.0/24; `host` is the gateway. `first`: the start of its
    own, unwanted DHCP range.

    `forwards` have QEMU's form: PROTOCOL:HOST_ADDRESS:HOST_PORT-GUEST_ADDRESS:GUEST_PORT.
    """

    network: str
    host: str
    name_server: str
    first: str
    domain: str = ""
    outside: bool = True
    forwards: tuple[str, ...] = ()
    host_loopback: bool = False  # whether what guests send to `host` reaches 127.0.0.1; enforced by the switch

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> GatewaySetup:
        """Parse JSON. Raises InvalidSpec."""
        try:
            setup = cls(**{**document, "forwards": tuple(document.get("forwards", ()))})
            ipaddress.IPv4Network(setup.network)
            if not isinstance(setup.host_loopback, bool):
                raise ValueError("host_loopback must be true or false")
            for one in (setup.host, setup.name_server, setup.first):
                ipaddress.IPv4Address(one)
            words = [setup.domain, *setup.forwards]
            for one in setup.forwards:
                int(one.partition("-")[0].rpartition(":")[2])
            if len(setup.forwards) > MAX_FORWARDS or any(not word.isascii() or "," in word for word in words):
                raise ValueError("a domain or a forwarded port contains a comma, or there are too many")
        except (TypeError, ValueError, AttributeError) as error:
            raise errors.InvalidSpec(f"these are not settings of a gateway: {error}") from error
        return setup

    def to_document(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "forwards": list(self.forwards)}


def problem_of(said: str) -> str:
    """Why the helper ended, from its output: the last line, without the helper's name and the option that it refers
    to.
    """
    lines = said.strip().splitlines()
    return lines[-1].removeprefix(f"{QEMU}: ").rpartition("}: ")[2] if lines else "it gave no reason"


def command(setup: GatewaySetup, peer: str, address: str) -> list[str]:
    """The helper's command line: it binds `peer` and sends to the switch's socket `address`. Pure."""
    # As JSON it is created in its turn, before the socket, so that the socket appears only after everything else
    # exists.
    user: dict[str, Any] = {"type": "user", "id": "out", "ipv6": False, "net": setup.network, "host": setup.host}
    user |= {"dns": setup.name_server, "dhcpstart": setup.first}
    if setup.domain:
        user["domainname"] = setup.domain
    if not setup.outside:
        user["restrict"] = True
    if setup.forwards:
        user["hostfwd"] = [{"str": one} for one in setup.forwards]
    port = f"dgram,id=port,local.type=unix,local.path={peer},remote.type=unix,remote.path={address}"
    words = [QEMU, "-machine", "none", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-sandbox", _SANDBOX, "-netdev", json.dumps(user), "-netdev", "hubport,id=hub-out,hubid=0,netdev=out"]
    return [*words, "-netdev", port, "-netdev", "hubport,id=hub-port,hubid=0,netdev=port"]
