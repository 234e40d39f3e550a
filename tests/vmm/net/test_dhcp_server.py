# SPDX-License-Identifier: Apache-2.0
"""Which address a client of a `user` switch gets."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.net import dhcp_client, packets
from tests.vmm.net.dhcp_client import ACK, DECLINE, DISCOVER, INFORM, NAK, OFFER, RELEASE, REQUEST, Answer
from vmm.model import errors
from vmm.net import dhcp_message, dhcp_server, lease_file
from vmm.net.dhcp_server import DhcpServer, DhcpSetup

ONE, TWO = packets.mac(1), packets.mac(2)
FIXED = packets.mac(9)
SETUP = DhcpSetup(
    "10.0.7.0/24", "10.0.7.1", "10.0.7.128", "10.0.7.254", "10.0.7.2", "vmm.internal", 1400,
    fixed=(("02:00:00:00:00:09", "10.0.7.10", "web"),),
)  # fmt: skip
SMALL = DhcpSetup(
    "10.0.7.0/29", "10.0.7.1", "10.0.7.0", "10.0.7.7", "10.0.7.2", fixed=(("020000000009", "10.0.7.3", ""),)
)


def ask(server: DhcpServer, mac: bytes, kind: int, now: float = 0.0, **settings: Any) -> Answer | None:
    """The server's answer to a client's message."""
    own = settings.pop("own", frozenset())
    port = settings.pop("port", "")
    message = dhcp_message.parse(dhcp_client.ask(mac, kind, **settings))
    assert message is not None
    frame = server.answer(message, now, port=port, own=own)
    return dhcp_client.read(frame) if frame else None


def selected(server: DhcpServer, mac: bytes, now: float = 0.0, **settings: Any) -> str:
    """The address after DISCOVER and REQUEST."""
    offer = ask(server, mac, DISCOVER, now, **settings)
    assert offer is not None
    assert offer.kind == OFFER
    options = {50: socket.inet_aton(offer.yours), 54: offer.options[54]}
    ack = ask(server, mac, REQUEST, now, options=options, **settings)
    assert ack is not None
    assert (ack.kind, ack.yours) == (ACK, offer.yours)
    return ack.yours


def wants(address: str) -> dict[int, bytes]:
    """Option 50, the requested address."""
    return {50: socket.inet_aton(address)}


def test_a_lease_and_its_options() -> None:
    """A lease has mask, router, name server, domain, MTU and times; a fixed address comes with its name."""
    server = DhcpServer(SETUP)
    address = selected(server, ONE)
    assert ipaddress.IPv4Address("10.0.7.128") <= ipaddress.IPv4Address(address) <= ipaddress.IPv4Address("10.0.7.254")
    ack = ask(server, ONE, REQUEST, options=wants(address))
    assert ack is not None
    assert [ack.address(code) for code in (1, 3, 6, 28, 54)] == [
        "255.255.255.0", "10.0.7.1", "10.0.7.2", "10.0.7.255", "10.0.7.1",
    ]  # fmt: skip
    assert (ack.options[15], ack.options[26]) == (b"vmm.internal", (1400).to_bytes(2, "big"))
    assert [int.from_bytes(ack.options[code], "big") for code in (51, 58, 59)] == [3600, 1800, 3150]
    assert 12 not in ack.options
    assert selected(server, FIXED) == "10.0.7.10"
    named = ask(server, FIXED, REQUEST, options={**wants("10.0.7.10"), 55: bytes([12])})
    assert named is not None
    assert named.options[12] == b"web"
    assert {1, 3, 6} & set(named.options) == set()  # it requested only the name


def test_addresses_are_derived_from_the_mac_address() -> None:
    """A server that lost its table assigns the same addresses again."""
    first, again = DhcpServer(SETUP), DhcpServer(SETUP)
    assert [selected(first, packets.mac(n)) for n in range(20)] == [selected(again, packets.mac(n)) for n in range(20)]


def test_renewing_rebinding_and_after_a_reboot() -> None:
    """Each gets an ACK for the client's own address, and a NAK for another client's or one of another network."""
    server = DhcpServer(SETUP)
    mine, other = selected(server, ONE), selected(server, TWO)
    for settings in ({"present": mine, "to": "10.0.7.1"}, {"present": mine}, {"options": wants(mine)}):
        answer = ask(server, ONE, REQUEST, 1700, **settings)
        assert answer is not None
        assert (answer.kind, answer.yours) == (ACK, mine)
    for address in (other, "10.0.8.9", "10.0.7.1", "10.0.7.2", "10.0.7.10", "10.0.7.255", "10.0.7.127"):
        answer = ask(server, ONE, REQUEST, 1700, options=wants(address))
        assert answer is not None
        assert (answer.kind, answer.yours) == (NAK, "0.0.0.0")


def test_a_server_that_lost_its_table_grants_renewals() -> None:
    """A renewal of an unknown lease is granted if no other client has the address."""
    server = DhcpServer(SETUP)
    answer = ask(server, ONE, REQUEST, present="10.0.7.200")
    assert answer is not None
    assert answer.kind == ACK
    second = ask(server, TWO, REQUEST, present="10.0.7.200")
    assert second is not None
    assert second.kind == NAK


def test_a_client_that_chose_another_server_gets_nothing() -> None:
    """The offer to it is free again."""
    server = DhcpServer(SETUP)
    offer = ask(server, ONE, DISCOVER)
    assert offer is not None
    options = {**wants(offer.yours), 54: socket.inet_aton("10.0.7.77")}
    assert ask(server, ONE, REQUEST, options=options) is None
    taken = ask(server, TWO, REQUEST, options=wants(offer.yours))
    assert taken is not None
    assert taken.kind == ACK


def test_release_decline_and_inform() -> None:
    """A released address is kept for its client, a declined one is not assigned for a while, and INFORM leases
    nothing."""
    server = DhcpServer(SETUP)
    mine = selected(server, ONE)
    assert ask(server, ONE, RELEASE, present=mine) is None
    assert selected(server, ONE, 5000) == mine
    assert ask(server, ONE, DECLINE, 5000, options=wants(mine)) is None
    assert selected(server, ONE, 5000) != mine
    refused = ask(server, TWO, REQUEST, 5000, options=wants(mine))
    assert refused is not None
    assert refused.kind == NAK
    later = ask(server, TWO, REQUEST, 5000 + dhcp_server.DECLINED_SECONDS, options=wants(mine))
    assert later is not None
    assert later.kind == ACK
    answer = ask(server, packets.mac(3), INFORM, present="10.0.7.50")
    assert answer is not None
    assert (answer.kind, answer.yours, answer.to, 51 in answer.options) == (ACK, "0.0.0.0", "10.0.7.50", False)
    assert len(server.records) == 2


def test_a_full_range_waits_for_leases_to_end() -> None:
    """A client is never offered an address that another one has; the address that has been free longest is assigned
    first."""
    server = DhcpServer(SMALL)
    got = [selected(server, packets.mac(n), n) for n in (1, 2, 4)]
    assert sorted(got) == ["10.0.7.4", "10.0.7.5", "10.0.7.6"]
    assert ask(server, packets.mac(5), DISCOVER, 100) is None
    assert selected(server, FIXED, 100) == "10.0.7.3"
    assert selected(server, packets.mac(5), 3603.5) == got[0]


def test_a_port_can_only_manage_its_own_addresses() -> None:
    """A guest can neither take nor release another's lease; one that may send from any address has a limit."""
    server = DhcpServer(SETUP)
    mine = selected(server, ONE)
    evil = frozenset({TWO})
    for kind, settings in ((DISCOVER, {}), (RELEASE, {"present": mine}), (DECLINE, {"options": wants(mine)})):
        assert ask(server, TWO, kind, own=evil, station=ONE, **settings) is None
    assert server.records[ONE].held_until == 3600
    wide = DhcpServer(DhcpSetup("10.1.0.0/16", "10.1.0.1", "10.1.1.0", "10.1.255.254"))
    for number in range(dhcp_server.MAX_PORT_LEASES):
        selected(wide, packets.mac(number), port="greedy")
    assert ask(wide, packets.mac(999), DISCOVER, port="greedy") is None
    refused = ask(wide, packets.mac(999), REQUEST, port="greedy", options=wants("10.1.9.9"))
    assert refused is not None
    assert refused.kind == NAK
    selected(wide, packets.mac(999), port="other")


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`INV-DHCP-TABLE-BOUNDED`: one client too many gets no lease until another lease has ended."""
    monkeypatch.setattr(dhcp_server, "MAX_RECORDS", 5)
    server = DhcpServer(SETUP)
    for number in range(10, 15):
        selected(server, packets.mac(number), number)
    assert ask(server, ONE, DISCOVER, 20) is None
    assert selected(server, FIXED, 20) == "10.0.7.10"
    assert len(server.records) == 6
    selected(server, ONE, 3612)
    assert packets.mac(10) not in server.records


def test_requests_of_a_port_are_rate_limited() -> None:
    """Above its burst a port gets no answers until time has passed; other ports do."""
    server = DhcpServer(SETUP)
    assert [server.takes("one", 0.0) for _ in range(dhcp_server.MESSAGES_BURST + 1)][-2:] == [True, False]
    assert server.takes("two", 0.0)
    assert server.takes("one", 1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"network": "rubbish"}, {"server": "10.0.7"}, {"first": "10.0.7.9", "last": "10.0.7.8"}, {"colour": 1},
        {"fixed": [["02", "10.0.7.9", ""]]}, {"fixed": [1]}, {"lease_seconds": 1}, {"mtu_bytes": 70000},
        {"domain": "ä"}, {"domain": "a" * 256},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    """Each is refused when it is set, not when a client asks."""
    with pytest.raises(errors.InvalidSpec, match="not settings of a DHCP server"):
        DhcpSetup.from_document({**SETUP.to_document(), **change})
    assert DhcpSetup.from_document(SETUP.to_document()) == SETUP


STEP = st.one_of(
    st.tuples(
        st.sampled_from([DISCOVER, REQUEST, REQUEST, DECLINE, RELEASE, INFORM]),
        st.sampled_from([1, 2, 3, 9]),
        st.integers(-1, 7),  # the requested address; -1: none
        st.integers(-1, 7),  # the address in use
    ),
    st.just("select"), st.just("restart"), st.just("wait"), st.just("hour"),
)  # fmt: skip


@given(st.lists(STEP, max_size=60))
def test_no_two_clients_have_one_address(steps: list[Any]) -> None:
    """`INV-DHCP-ONE-HOLDER`, `INV-DHCP-RANGE`: whatever they send, in any order, with restarts from the kept table."""
    server, now = DhcpServer(SMALL), 1000.0
    held: dict[str, tuple[bytes, float]] = {}  # address -> client, until

    def seen(mac: bytes, answer: Answer | None) -> None:
        if answer is None or answer.kind != ACK or answer.yours == "0.0.0.0":
            return
        assert answer.yours == "10.0.7.3" if mac == FIXED else answer.yours in ("10.0.7.4", "10.0.7.5", "10.0.7.6")
        for address in [one for one, (who, _) in held.items() if who == mac]:
            del held[address]
        assert answer.yours not in held or held[answer.yours][1] <= now
        held[answer.yours] = mac, now + 3600

    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "leases")
        for number, step in enumerate(steps):
            if server.unsaved:
                lease_file.write(path, server)
                server.was_saved()
            if step == "restart":
                server = DhcpServer(SMALL, lease_file.records(path, now, 3600))
            elif step in ("wait", "hour"):
                now += 100 if step == "wait" else 3601
            elif step == "select":
                mac = packets.mac(number % 5 + 1)
                offer = ask(server, mac, DISCOVER, now)
                if offer is not None:
                    seen(mac, ask(server, mac, REQUEST, now, options={**wants(offer.yours), 54: offer.options[54]}))
            else:
                kind, who, requested, present = step
                mac = packets.mac(who)
                options = {} if requested < 0 else wants(f"10.0.7.{requested}")
                in_use = "0.0.0.0" if present < 0 else f"10.0.7.{present}"
                answer = ask(server, mac, kind, now, options=options, present=in_use)
                if kind in (RELEASE, DECLINE, DISCOVER):  # the client itself releases its lease
                    for address in [one for one, (holder, _) in held.items() if holder == mac]:
                        del held[address]
                seen(mac, answer)
