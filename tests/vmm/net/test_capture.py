# SPDX-License-Identifier: Apache-2.0
"""pcapng streams, as tshark reads them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support import require_tool
from tests.vmm.net import packets
from vmm.net import capture
from vmm.net.capture import Direction, PacketCapture

ONE, TWO = packets.mac(1), packets.mac(2)


def read(stream: bytes, folder: Path, *fields: str) -> list[list[str]]:
    """The fields of every frame, as tshark sees them."""
    path = folder / "c.pcapng"
    path.write_bytes(stream)
    words = [word for field in fields for word in ("-e", field)]
    done = subprocess.run(
        [require_tool("tshark"), "-r", path, "-T", "fields", *words], capture_output=True, text=True, check=True
    )
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.mark.interop
def test_tshark_reads_a_capture(tmp_path: Path) -> None:
    """Addresses, VLANs, lengths, time to the nanosecond, and the port as the interface are all readable."""
    times = iter([1_700_000_000_123_456_789, 1_700_000_001_000_000_000])
    one = PacketCapture("vm1", clock=lambda: next(times))
    one.take("vm1", Direction.IN, packets.ethernet(TWO, ONE, bytes(47), vlan=10))
    one.take("vm1", Direction.OUT, packets.ethernet(ONE, TWO, bytes(46)))
    fields = ("eth.src", "vlan.id", "frame.len", "frame.time_epoch", "frame.interface_name")
    assert read(bytes(one.pending), tmp_path, *fields) == [
        ["02:00:00:00:00:01", "10", "65", "1700000000.123456789", "vm1"],
        ["02:00:00:00:00:02", "", "60", "1700000001.000000000", "vm1"],
    ]


@pytest.mark.interop
def test_long_frames_are_truncated(tmp_path: Path) -> None:
    """The recorded length is the frame's, and the file has as many bytes as were requested."""
    one = PacketCapture(None, snap_bytes=64)
    one.take("p", Direction.IN, packets.ethernet(TWO, ONE, bytes(1000)))
    assert read(bytes(one.pending), tmp_path, "frame.len", "frame.cap_len") == [["1014", "64"]]


def test_the_stream_says_how_many_frames_a_slow_reader_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames beyond the limit are dropped; as soon as there is room again, the stream says how many are missing."""
    monkeypatch.setattr(capture, "MAX_BUFFER_BYTES", 1000)
    one = PacketCapture(None)
    frame = packets.ethernet(TWO, ONE, bytes(200))
    for _ in range(10):
        one.take("p", Direction.IN, frame)
    assert (one.taken_frames, one.lost_frames) == (3, 7)
    assert len(one.pending) <= 1000 + 100
    one.pending.clear()
    one.take("p", Direction.IN, frame)
    assert capture._statistics(0, 0, 7)[:8] == bytes(one.pending[:8])
    assert (7).to_bytes(8, "little") in bytes(one.pending[:48])


def test_a_switchs_capture_has_each_frame_once() -> None:
    """Outgoing frames are not recorded again, because they came in at another port."""
    one = PacketCapture(None)
    one.take("a", Direction.IN, packets.ethernet(TWO, ONE))
    one.take("b", Direction.OUT, packets.ethernet(TWO, ONE))
    assert one.taken_frames == 1


def test_blocks_are_whole() -> None:
    """Each block has its length at both ends, and blocks follow one another without gaps."""
    one = PacketCapture(None)
    for size in range(20):
        one.take("p", Direction.IN, packets.ethernet(TWO, ONE, bytes(size)))
    stream, at, kinds = bytes(one.pending), 0, []
    while at < len(stream):
        size = int.from_bytes(stream[at + 4 : at + 8], "little")
        assert size % 4 == 0
        assert stream[at + size - 4 : at + size] == stream[at + 4 : at + 8]
        kinds.append(stream[at])
        at += size
    assert at == len(stream)
    assert json.dumps(kinds) == json.dumps([10, 1, *[6] * 20])
