# SPDX-License-Identifier: Apache-2.0
"""Converting: the same content in another kind of image, complete or not at all."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vhdkit
from vhdkit import DiskFormat, errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.stream import export_stream
from vhdkit.chain.verbs.zeros import data_ranges
from vhdkit.units import KIB, MIB, PAGE_SIZE, SECTOR_SIZE, round_up

SIZE = 9 * MIB + 5 * SECTOR_SIZE


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, bytes]:
    """A chain of three layers of a little over 9 MiB, and its content."""
    rng = random.Random(1)
    content = bytearray(SIZE)
    paths = [tmp_path / name for name in ("base.vhd", "middle.avhd", "leaf.avhd")]
    for number, path in enumerate(paths):
        if number:
            vhdkit.create_child(path, paths[number - 1], block_size_bytes=number * MIB)
        else:
            vhdkit.create_image(path, SIZE, block_size_bytes=MIB)
        with vhdkit.open_disk(path, writable=True) as disk:
            for _ in range(12):
                size = rng.choice((SECTOR_SIZE, 4 * KIB, 100 * KIB, MIB))
                offset = rng.randrange(SIZE - size)
                data = rng.randbytes(size) if rng.random() < 0.7 else bytes(size)
                disk.write(offset, data)
                content[offset : offset + size] = data
    return paths[2], bytes(content)


def content_of(path: Path) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


@pytest.mark.parametrize("to", list(DiskFormat))
def test_a_chain_becomes_one_image_with_the_same_content(
    chain: tuple[Path, bytes], tmp_path: Path, to: DiskFormat
) -> None:
    """Converted to any format, a chain reads the same, and the result has no findings."""
    leaf, content = chain
    out = tmp_path / "out.vhd" if to is not DiskFormat.RAW else tmp_path / "out.raw"
    size = round_up(SIZE, PAGE_SIZE if to in (DiskFormat.VHDX, DiskFormat.VHDX_FIXED) else SECTOR_SIZE)
    assert vhdkit.convert(leaf, out, to) == size  # a VHDX has whole pages, the last one with zeros
    assert content_of(out) == content.ljust(size, b"\0")
    assert vhdkit.check(out) == []
    if to is DiskFormat.RAW:
        assert out.read_bytes() == content


@pytest.mark.parametrize("to", list(DiskFormat))
def test_zeros_become_holes(tmp_path: Path, to: DiskFormat) -> None:
    """Zeros that were written, and holes of the source, take no space in the result."""
    source = tmp_path / "source.raw"
    with source.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(8 * MIB)
        file.write(bytes(8 * MIB))
        file.seek(32 * MIB)
        file.write(b"x" * 64 * KIB)
    vhdkit.convert(source, tmp_path / "out", to)
    log = MIB if to in (DiskFormat.VHDX, DiskFormat.VHDX_FIXED) else 0  # has its space from the beginning
    assert (tmp_path / "out").stat().st_blocks * 512 <= (400 * KIB + log if log else 256 * KIB)


def test_progress_rises_to_the_end(chain: tuple[Path, bytes], tmp_path: Path) -> None:
    """Progress never falls, and ends at the whole size."""
    seen: list[tuple[int, int]] = []
    vhdkit.convert(chain[0], tmp_path / "out", DiskFormat.RAW, progress=lambda *step: seen.append(step))
    assert seen == sorted(seen)
    assert seen[-1] == (SIZE, SIZE)


def test_azure_rounds_up_to_whole_mib(chain: tuple[Path, bytes], tmp_path: Path) -> None:
    """An Azure image is fixed and a whole number of MiB, with zeros at the end and the footer right behind."""
    out = tmp_path / "azure.vhd"
    assert vhdkit.convert(chain[0], out, DiskFormat.FIXED, azure=True) == 10 * MIB
    assert out.stat().st_size == 10 * MIB + 512
    assert content_of(out) == chain[1].ljust(10 * MIB, b"\0")
    with pytest.raises(errors.InvalidArgument, match="fixed"):
        vhdkit.convert(chain[0], tmp_path / "no", DiskFormat.DYNAMIC, azure=True)


def test_an_existing_file_needs_replace(chain: tuple[Path, bytes], tmp_path: Path) -> None:
    """Without `replace` an existing file is kept; with it, it is replaced as a whole."""
    out = tmp_path / "out.raw"
    out.write_bytes(b"precious")
    with pytest.raises(errors.AlreadyExists):
        vhdkit.convert(chain[0], out, DiskFormat.RAW)
    assert out.read_bytes() == b"precious"
    vhdkit.convert(chain[0], out, DiskFormat.RAW, replace=True)
    assert out.read_bytes() == chain[1]


@pytest.mark.parametrize("name", ["base.vhd", "middle.avhd", "leaf.avhd", "link"])
def test_no_file_of_the_source_is_ever_replaced(chain: tuple[Path, bytes], tmp_path: Path, name: str) -> None:
    """Even with `replace`, and even under another name, no layer of the source is overwritten."""
    (tmp_path / "link").hardlink_to(tmp_path / "base.vhd")
    with pytest.raises(errors.InvalidArgument, match="part of the source chain"):
        vhdkit.convert(chain[0], tmp_path / name, DiskFormat.DYNAMIC, replace=True)
    assert content_of(chain[0]) == chain[1]


def test_images_in_use_and_parents_are_not_replaced(chain: tuple[Path, bytes], tmp_path: Path) -> None:
    """A destination that is open, or that other images build on, is refused."""
    other, base = tmp_path / "other.vhd", tmp_path / "parent.vhd"
    vhdkit.create_image(other, MIB)
    with vhdkit.open_disk(other), pytest.raises(errors.ImageInUse):
        vhdkit.convert(chain[0], other, DiskFormat.RAW, replace=True)
    vhdkit.create_image(base, MIB)
    vhdkit.create_child(tmp_path / "of-parent.avhd", base)
    with pytest.raises(errors.HasChildren, match="of-parent"):
        vhdkit.convert(chain[0], base, DiskFormat.RAW, replace=True)


class Stop(Exception):
    """The caller's interruption."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_interruption_leaves_no_file(chain: tuple[Path, bytes], tmp_path: Path, error: type[BaseException]) -> None:
    """An error or Ctrl-C in the middle leaves no new file, and the file to be replaced unchanged."""
    out = tmp_path / "out.raw"
    out.write_bytes(b"precious")
    before = set(tmp_path.iterdir())

    def stop(done: int, size: int) -> None:
        raise error

    with pytest.raises(error):
        vhdkit.convert(chain[0], out, DiskFormat.RAW, replace=True, progress=stop)
    assert set(tmp_path.iterdir()) == before
    assert out.read_bytes() == b"precious"


def test_a_failing_source_fails_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error reaches the caller, and no file is left."""
    source = tmp_path / "source.raw"
    source.write_bytes(b"x" * MIB)

    def fail(*args: object) -> None:
        raise errors.IoFailed("simulated")

    monkeypatch.setattr("vhdkit.chain.engine.ahead.Ahead.read_into", fail)
    with pytest.raises(errors.IoFailed):
        vhdkit.convert(source, tmp_path / "out", DiskFormat.DYNAMIC)
    assert list(tmp_path.iterdir()) == [source]


def test_a_raw_file_with_a_partial_sector_is_rounded_up(tmp_path: Path) -> None:
    """1000 bytes become two sectors; the rest of the last one is zeros."""
    source = tmp_path / "source.raw"
    source.write_bytes(b"x" * 1000)
    assert vhdkit.convert(source, tmp_path / "out.vhd", DiskFormat.FIXED) == 1024
    assert content_of(tmp_path / "out.vhd") == b"x" * 1000 + bytes(24)


@given(
    st.lists(st.tuples(st.integers(0, 79), st.integers(1, 30), st.integers(0, 511)), max_size=6),
    st.integers(1, 80),
)
def test_data_ranges_hold_every_nonzero_byte(runs: list[tuple[int, int, int]], sector_count: int) -> None:
    """All bytes outside are zeros; the ranges are ordered, disjoint, inside the disk, without long runs of zeros."""
    raw = bytearray(sector_count * SECTOR_SIZE)
    for sector, count, byte in runs:
        for number in range(sector, min(sector + count, sector_count)):
            raw[number * SECTOR_SIZE + byte] = 1
    ranges = data_ranges(memoryview(raw))
    outside = bytearray(raw)
    last = -1
    for start, stop in ranges:
        assert last < start < stop <= len(raw)
        assert start % SECTOR_SIZE == 0 and stop % SECTOR_SIZE == 0
        pages = np.frombuffer(bytes(raw[start:stop]).ljust(-(-(stop - start) // PAGE_SIZE) * PAGE_SIZE), np.uint8)
        assert pages.reshape(-1, PAGE_SIZE)[0].any()
        outside[start:stop] = bytes(stop - start)
        last = stop
    assert not any(outside)


def test_a_file_being_replaced_cannot_be_opened(chain: tuple[Path, bytes], tmp_path: Path) -> None:
    """The destination is locked during a replacement: a program that opened it would lose what it writes."""
    out = tmp_path / "out.vhd"
    vhdkit.create_image(out, MIB)
    refused = []

    def try_to_open(done: int, size: int) -> None:
        with pytest.raises(errors.ImageInUse):
            vhdkit.open_disk(out, writable=True)
        refused.append(done)

    vhdkit.convert(chain[0], out, DiskFormat.DYNAMIC, replace=True, progress=try_to_open)
    assert refused
    vhdkit.open_disk(out, writable=True).close()


def test_a_replaced_file_keeps_its_mode(chain: tuple[Path, bytes], tmp_path: Path) -> None:
    """A file that only its owner could read stays private."""
    out = tmp_path / "secret.raw"
    out.write_bytes(b"old")
    out.chmod(0o600)
    vhdkit.convert(chain[0], out, DiskFormat.RAW, replace=True)
    assert out.stat().st_mode & 0o777 == 0o600


def test_a_raw_base_is_not_replaced_under_its_child(chain: tuple[Path, bytes], tmp_path: Path) -> None:
    """A child of a raw disk records no id, but its names show that it builds on that disk."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"r" * MIB)
    vhdkit.create_child(tmp_path / "of-raw.avhd", base)
    with pytest.raises(errors.HasChildren, match="of-raw"):
        vhdkit.convert(chain[0], base, DiskFormat.RAW, replace=True)
    with pytest.raises(errors.HasChildren, match="of-raw"):
        vhdkit.open_disk(base, writable=True)
    other = tmp_path / "other.raw"
    other.write_bytes(b"o" * MIB)
    vhdkit.open_disk(other, writable=True).close()


@pytest.mark.parametrize("to", ["raw", "vhdx", "pipe", "compare"])
def test_a_source_that_becomes_smaller_is_refused(tmp_path: Path, to: str) -> None:
    """A program that knows no locks cuts the source off: what is missing is not taken for zeros."""
    source, out = tmp_path / "source.raw", tmp_path / "out"
    source.write_bytes(bytes(range(1, 251)) * (KIB * 32 // 250 * 1024))

    def cut(done: int, total: int) -> None:
        if done:
            os.truncate(source, MIB)

    with pytest.raises(errors.IoFailed, match="became smaller while it was read"):
        if to == "compare":
            (tmp_path / "other.raw").write_bytes(source.read_bytes())
            vhdkit.compare(source, tmp_path / "other.raw", progress=cut)
        elif to == "pipe":
            with Chain.open(source) as opened:
                export_stream(opened, len, DiskFormat.RAW, progress=cut)
        else:
            vhdkit.convert(source, out, to, progress=cut)
    assert not out.exists()
