# SPDX-License-Identifier: Apache-2.0
"""INV-SWITCH-MODEL and INV-FRAME-BOUNDED for any frames: the switch does what a naive 802.1Q bridge does.

Fed: one byte that chooses the ports' rules, then frames as (port, pause in seconds, size in two bytes, bytes). Tried:
the engine beside the model; a second engine with every guard on, which may only drop more than the model, and never
raises; what a capture of it says is whole.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence

from fuzz.loop import main
from fuzz.mutate import mutate_bytes
from tests.vmm.net.bridge_model import ModelBridge, ModelPort
from vmm.net.capture import Direction, PacketCapture
from vmm.net.engine import AGEING_SECONDS, Engine, PortRules, VlanMode

_STATION = bytes.fromhex("020000000001")
_RULES = (
    PortRules(),
    PortRules(mode=VlanMode.ACCESS, vlan=10),
    PortRules(mode=VlanMode.TRUNK, vlan=10, allowed=frozenset({10, 20})),
    PortRules(mode=VlanMode.TRUNK, allowed=frozenset({20})),
    PortRules(addresses=frozenset({_STATION})),
)
_PORTS = 3


def target(data: bytes) -> None:
    """Send these frames through the switches."""
    choice = data[0] if data else 0
    rules = [_RULES[(choice // len(_RULES) ** number) % len(_RULES)] for number in range(_PORTS)]
    switch, guarded, model, capture = Engine(), Engine(), ModelBridge(AGEING_SECONDS), PacketCapture(None)
    for number, one in enumerate(rules):
        switch.add_port(f"p{number}", one)
        guarded.add_port(f"p{number}", _guarded(one))
        model.ports[f"p{number}"] = ModelPort(
            one.vlan, set(one.allowed), set(one.addresses), one.mode is VlanMode.TRUNK
        )
    now = 0.0
    for port, pause, frame in frames_in(data[1:]):
        now += pause
        name = f"p{port % _PORTS}"
        expected = sorted(model.forward(name, frame, now))
        assert sorted(switch.forward(name, frame, now)) == expected, "the switch and the model differ"
        passed = guarded.forward(name, frame, now)
        assert not passed or len(passed) >= len(expected) > 0, "a guard let something pass that nobody should get"
        capture.take(name, Direction.IN, frame)
    assert len(capture.pending) % 4 == 0


def _guarded(rules: PortRules) -> PortRules:
    return PortRules(
        rules.addresses, rules.spoofing, rules.mode, rules.vlan, rules.allowed, True, True,
        storm_frames_per_second=50,
    )  # fmt: skip


def frames_in(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(port, pause, frame) of every record."""
    at = 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at + 2 : at + 4], "little")
        yield data[at], data[at + 1], data[at + 4 : at + 4 + size]
        at += 4 + size


def record(port: int, frame: bytes, pause: int = 0) -> bytes:
    """A frame as `target` takes it."""
    return bytes([port, pause]) + len(frame).to_bytes(2, "little") + frame


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Bytes inside frames changed, records left out, repeated, taken from another input."""
    records = list(frames_in(data[1:])) or [(0, 0, b"")]
    if others and rng.random() < 0.3:
        records += frames_in(rng.choice(others)[1:])
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(records))
        port, pause, frame = records[at]
        kind = rng.randrange(5)
        if kind == 0:
            records[at] = port, pause, mutate_bytes(frame, rng, ())[:9300]
        elif kind == 1:
            records[at] = rng.randrange(_PORTS), rng.choice((0, 1, 200, 255)), frame
        elif kind == 2 and len(frame) >= 12:
            records[at] = port, pause, frame[6:12] + frame[:6] + frame[12:]
        elif kind == 3 and len(frame) >= 12:
            vlan = rng.choice((0, 10, 20, 4095, rng.randrange(65536)))
            records[at] = port, pause, frame[:12] + b"\x81\x00" + vlan.to_bytes(2, "big") + frame[12:]
        else:
            records.insert(at, records[rng.randrange(len(records))])
    first = bytes([rng.randrange(125)]) if rng.random() < 0.3 else data[:1] or b"\0"
    return first + b"".join(record(port, frame, pause) for port, pause, frame in records[:200])


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_switch", mutate))
