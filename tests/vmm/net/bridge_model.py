# SPDX-License-Identifier: Apache-2.0
"""A naive 802.1Q bridge to compare the switch with: it parses every frame completely and searches every list from its
start.

It shares no code with the switch: a frame is (destination, source, priority, VLAN of its tag, rest), and a port
(VLAN of its untagged frames, set of VLANs that it may tag).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelPort:
    """A port of the model."""

    native: int
    tagged: set[int]
    only_from: set[bytes]
    is_trunk: bool


@dataclass
class ModelBridge:
    """Ports by name, and a log of (time, VLAN, address, port) that is never shortened."""

    ageing: float
    ports: dict[str, ModelPort] = field(default_factory=dict)
    log: list[tuple[float, int, bytes, str]] = field(default_factory=list)

    def where(self, vlan: int, address: bytes, now: float) -> str | None:
        """The port on which the address was last seen, unless it has aged out."""
        for time, seen_vlan, seen, port in reversed(self.log):
            if (seen_vlan, seen) == (vlan, address) and port in self.ports:
                return port if now - time <= self.ageing else None
        return None

    def forget(self, name: str) -> None:
        """Forget everything about this port."""
        self.log = [entry for entry in self.log if entry[3] != name]

    def forward(self, name: str, frame: bytes, now: float) -> list[tuple[str, bytes]]:
        """Which ports get the frame, and in which form."""
        port = self.ports[name]
        destination, source = frame[0:6], frame[6:12]
        priority, said, rest = None, 0, frame[12:]
        if len(frame) < 14 or source[0] % 2 == 1:
            return []
        if frame[12] == 0x81 and frame[13] == 0x00:
            if len(frame) < 18:
                return []
            priority, said, rest = frame[14] >> 4, (frame[14] & 15) * 256 + frame[15], frame[16:]
        if port.only_from and source not in port.only_from:
            return []
        if destination[:5].hex() == "0180c20000" and destination[5] < 16:
            return []
        foreign = frame[12:14] in (b"\x88\xa8", b"\x91\x00")
        if foreign and not port.is_trunk:
            return []
        if said == 0:
            vlan = port.native
        elif said in port.tagged:
            vlan = said
        else:
            return []
        self.log.append((now, vlan, source, name))
        place = None if destination[0] % 2 else self.where(vlan, destination, now)
        result = []
        nested = frame[12:14] == b"\x81\x00" and frame[16:18] in (b"\x81\x00", b"\x88\xa8", b"\x91\x00")
        if nested and not port.is_trunk:
            return []
        for other, settings in self.ports.items():
            if foreign and not settings.is_trunk:
                continue
            if other == name or (place is not None and other != place):
                continue
            if vlan == settings.native:
                if nested:
                    return []  # the inner tag would become the frame's own
                result.append((other, destination + source + rest))
            elif vlan in settings.tagged:
                value = (priority or 0) * 4096 + vlan
                result.append((other, destination + source + b"\x81\x00" + value.to_bytes(2, "big") + rest))
        return result
