# SPDX-License-Identifier: Apache-2.0
"""A switch's DHCP server together with its file."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.vmm.net import dhcp_client, packets
from tests.vmm.net.dhcp_client import ACK, DISCOVER, REQUEST
from tests.vmm.net.test_dhcp_server import ONE, SETUP, TWO
from vmm.net import dhcp_message, dhcp_server, lease_file
from vmm.net.engine import Drop, Port, PortRules
from vmm.net.kept_dhcp import KeptDhcp


def said(kept: KeptDhcp, port: Port, mac: bytes, kind: int, address: str = "") -> dhcp_client.Answer | None:
    """The server's answer to a client at the port."""
    options = {50: socket.inet_aton(address)} if address else {}
    message = dhcp_message.parse(dhcp_client.ask(mac, kind, options=options))
    assert message is not None
    frame = kept.answer(port, message)
    return dhcp_client.read(frame) if frame else None


def test_a_lease_is_saved_before_it_is_sent(tmp_path: Path) -> None:
    """`INV-DHCP-ONE-HOLDER`: after a kill at any time the next server knows the lease; renewals write nothing."""
    path = tmp_path / "leases"
    kept, port = KeptDhcp(SETUP, str(path)), Port("one", PortRules())
    offer = said(kept, port, ONE, DISCOVER, "10.0.7.200")
    assert offer is not None
    assert not path.exists()
    ack = said(kept, port, ONE, REQUEST, "10.0.7.200")
    assert ack is not None
    assert [one["address"] for one in lease_file.read(str(path))] == ["10.0.7.200"]
    before = path.stat().st_ino
    assert said(kept, port, ONE, REQUEST, "10.0.7.200") is not None
    assert path.stat().st_ino == before
    again = KeptDhcp(SETUP, str(path))
    refused = said(again, port, TWO, REQUEST, "10.0.7.200")
    assert refused is not None
    assert refused.kind == dhcp_client.NAK


def test_a_renewal_that_was_not_saved_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`INV-DHCP-ONE-HOLDER`: the next server does not know of it, and does not assign the address before it has
    ended."""
    path, port, clock = str(tmp_path / "leases"), Port("one", PortRules()), [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    kept = KeptDhcp(SETUP, path)
    assert said(kept, port, ONE, REQUEST, "10.0.7.200") is not None
    clock[0] += SETUP.lease_seconds / dhcp_server.SAVE_AGAIN - 1
    assert said(kept, port, ONE, REQUEST, "10.0.7.200") is not None
    ends = clock[0] + SETUP.lease_seconds
    clock[0] = ends - 2
    refused = said(KeptDhcp(SETUP, path), port, TWO, REQUEST, "10.0.7.200")
    assert refused is not None
    assert refused.kind == dhcp_client.NAK
    clock[0] = ends + 2
    given = said(KeptDhcp(SETUP, path), port, TWO, REQUEST, "10.0.7.200")
    assert given is not None
    assert given.kind == ACK


def test_a_lease_that_cannot_be_saved_is_not_sent(tmp_path: Path) -> None:
    """If the file cannot be written, no client gets a new lease, not even on a retry; existing leases stay."""
    kept, port = KeptDhcp(SETUP, str(tmp_path / "leases")), Port("one", PortRules())
    first = said(kept, port, ONE, REQUEST, "10.0.7.200")
    assert first is not None
    kept.path = str(tmp_path / "nowhere" / "leases")
    assert said(kept, port, TWO, REQUEST, "10.0.7.201") is None
    assert said(kept, port, TWO, REQUEST, "10.0.7.201") is None
    renewed = said(kept, port, ONE, REQUEST, "10.0.7.200")
    assert renewed is not None
    assert renewed.kind == ACK
    (tmp_path / "nowhere").mkdir()
    assert said(kept, port, TWO, REQUEST, "10.0.7.201") is not None


def test_ports_have_rules_and_a_limit(tmp_path: Path) -> None:
    """A guest can request only its own addresses, unless it may send from any; excess requests are counted."""
    kept = KeptDhcp(SETUP, str(tmp_path / "leases"))
    bound = Port("one", PortRules(addresses=frozenset({ONE})))
    assert said(kept, bound, TWO, DISCOVER) is None
    assert said(kept, bound, ONE, DISCOVER) is not None
    assert said(kept, Port("two", PortRules(addresses=frozenset({ONE}), spoofing=True)), TWO, DISCOVER) is not None
    flooding = Port("three", PortRules())
    for _ in range(dhcp_server.MESSAGES_BURST + 30):
        said(kept, flooding, packets.mac(3), DISCOVER)
    assert flooding.counters.drops[Drop.DHCP_FLOOD] > 0
