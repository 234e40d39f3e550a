# SPDX-License-Identifier: Apache-2.0
"""Captured streams in files of limited size and number."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.net import packets
from tests.vmm.net.test_capture import read
from vmm.model.errors import VmmError
from vmm.net.capture import PACKET, Direction, PacketCapture
from vmm.net.capture_files import MAX_BLOCK_BYTES, CaptureFiles

FRAME = packets.ethernet(packets.mac(2), packets.mac(1), bytes(950))


def stream(count: int) -> bytes:
    """What a switch sends for so many frames of two ports."""
    one = PacketCapture(None)
    for number in range(count):
        one.take(f"p{number % 2}", Direction.IN, FRAME)
    return bytes(one.pending)


def packets_in(content: bytes) -> int:
    """How many frames a file has; it must consist of whole blocks, beginning with a section."""
    assert content[:4] == b"\x0a\x0d\x0d\x0a"
    at = found = 0
    while at < len(content):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        assert content[at + size - 4 : at + size] == content[at + 4 : at + 8]
        found += int.from_bytes(content[at : at + 4], "little") == PACKET
        at += size
    assert at == len(content)
    return found


def test_a_full_file_ends_the_capture(tmp_path: Path) -> None:
    """The file has at most that size, and only whole frames; without a limit it takes everything."""
    path = tmp_path / "c.pcapng"
    with CaptureFiles(str(path), max_bytes=64 << 10) as taken:
        assert not taken.write(stream(100))
    assert (63 << 10) < path.stat().st_size <= 64 << 10
    assert packets_in(path.read_bytes()) == taken.frame_count < 100
    assert path.stat().st_mode & 0o777 == 0o600
    content = stream(100)
    with CaptureFiles(str(path)) as taken:
        assert taken.write(content)
    assert path.read_bytes() == content


@pytest.mark.interop
def test_the_newest_files_are_kept(tmp_path: Path) -> None:
    """Each can be read alone, with the names of all ports; the oldest is removed, and there are never more than
    requested."""
    with CaptureFiles(str(tmp_path / "c.pcapng"), max_bytes=64 << 10, max_files=3) as taken:
        for _ in range(5):
            content = stream(100)
            start = 0 if not taken.frame_count else content.index(b"\x06\0\0\0")
            assert taken.write(content[start:])
            assert len(list(tmp_path.iterdir())) <= 3
    names = sorted(one.name for one in tmp_path.iterdir())
    assert names == [Path(one).name for one in taken.names] == [f"c-{n:05}.pcapng" for n in (6, 7, 8)]
    assert all(packets_in((tmp_path / one).read_bytes()) for one in names)
    found = read((tmp_path / names[1]).read_bytes(), tmp_path, "frame.interface_name")
    assert {row[0] for row in found} == {"p0", "p1"}


@given(st.lists(st.integers(1, 900), max_size=20))
def test_a_stream_is_cut_between_blocks(cuts: list[int]) -> None:
    """However the stream arrives, the file has only whole blocks at any moment."""
    out, content, at = io.BytesIO(), stream(8), 0
    taken = CaptureFiles("-", stream=out)
    for size in [*cuts, len(content)]:
        assert taken.write(content[at : at + size])
        at += size
        if out.getvalue():
            packets_in(out.getvalue())
    assert out.getvalue() == content


@pytest.mark.parametrize("size", [0, 11, MAX_BLOCK_BYTES + 4, 0xFFFFFFFF])
def test_malformed_streams_are_refused(size: int) -> None:
    """An impossible length is an error; it is not a reason to wait or to keep bytes for ever."""
    with pytest.raises(VmmError, match="a block of"):
        CaptureFiles("-", stream=io.BytesIO()).write(b"\x06\0\0\0" + size.to_bytes(4, "little"))
