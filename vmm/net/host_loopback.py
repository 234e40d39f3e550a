# SPDX-License-Identifier: Apache-2.0
"""What guests may send to the gateway of a `user` switch without reaching this host's loopback. Pure.

Decides by a frame's bytes. libslirp sends traffic for the gateway's own address, and for 255.255.255.255, to 127.0.0.1
of the host; it connects to any other address as it is, including 127.0.0.0/8 and 0.0.0.0, and accepts frames whatever
their Ethernet address. Programs that listen only on 127.0.0.1 trust every client that reaches them. The following must
pass: echo requests, which it answers itself; requests to the name server; and a guest's side of connections that came
in through a forwarded port, because those seem to come from the gateway. Must not know ports of the switch.

`INV-HOST-LOOPBACK`: what passes opens no connection, and sends no datagram, to an address of the host's loopback,
except answers from a forwarded UDP port.
"""

from __future__ import annotations

import ipaddress

from vmm.net import frames
from vmm.net.gateway import GatewaySetup

_ICMP, _TCP, _UDP = 1, 6, 17
_DNS_PORT = 53
_SYN, _BEGINNING_FLAGS = 0x02, 0x37  # FIN, SYN, RST, ACK, URG: a connection begins with SYN alone
_IPV4_BYTES = 20
_LOOPBACK, _THIS_HOST, _EVERYBODY = 127, 0, b"\xff" * 4


class LoopbackFilter:
    """The filter of one gateway."""

    def __init__(self, setup: GatewaySetup) -> None:
        self._network = ipaddress.IPv4Network(setup.network)
        self._host = ipaddress.IPv4Address(setup.host).packed
        self._name_server = ipaddress.IPv4Address(setup.name_server).packed
        self._mask = int(self._network.netmask)
        self._base = int(self._network.network_address)
        ends = (one.rpartition("-")[2].rpartition(":") for one in setup.forwards if one.startswith("udp:"))
        self._answering = {(address, int(port)) for address, _, port in ends}

    def refuses(self, beginning: bytes) -> bool:
        """True for a frame that would reach the host's loopback. `beginning`: frames.INSPECT_BYTES of it, or all."""
        at = frames.ADDRESSES_BYTES + (frames.TAG_BYTES if frames.has_tag(beginning) else 0)
        packet = beginning[at + 2 :]
        if beginning[at : at + 2] != b"\x08\x00" or len(packet) < _IPV4_BYTES:
            return False
        target = packet[16:20]
        if target[0] in (_LOOPBACK, _THIS_HOST) or target == _EVERYBODY:
            return True
        if int.from_bytes(target, "big") & self._mask != self._base:
            return False
        return not self._may_pass(packet, target)

    def _may_pass(self, packet: bytes, target: bytes) -> bool:
        """True for permitted traffic to an address of the gateway's own network."""
        protocol, payload = packet[9], packet[(packet[0] & 0x0F) * 4 :]
        if target not in (self._host, self._name_server):
            return False  # a guest's address: the frame was flooded because no port was known for it
        if protocol == _ICMP:
            return True
        if int.from_bytes(packet[6:8], "big") & 0x3FFF or len(payload) < 8:
            return False  # only all fragments together say what they are
        source, destination = (int.from_bytes(payload[at : at + 2], "big") for at in (0, 2))
        if target == self._name_server and destination == _DNS_PORT and protocol in (_TCP, _UDP):
            return True
        if protocol == _TCP:
            return len(payload) >= 14 and payload[13] & _BEGINNING_FLAGS != _SYN
        own = str(ipaddress.IPv4Address(packet[12:16]))
        return protocol == _UDP and bool(self._answering & {(own, source), ("", source)})
