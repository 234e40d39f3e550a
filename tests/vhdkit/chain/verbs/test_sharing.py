# SPDX-License-Identifier: Apache-2.0
"""Sharing space between the source of a conversion and its result: the content is the same, and nothing is copied."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vhdkit
from tests.clones import FICLONERANGE, FakeClone
from tests.mounting import SHARING, copy_as_after_power_cut, file_system
from tests.support import require_tool, run
from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.sharing import can_share, pieces_to_move
from vhdkit.image import Piece
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE

SIZE = 6 * MIB
_writes = st.lists(
    st.tuples(
        st.integers(0, 2),  # the layer, the base first
        st.integers(0, SIZE // SECTOR_SIZE - 1) | st.integers(0, SIZE // PAGE_SIZE - 1).map(lambda page: page * 8),
        st.sampled_from([1, 7, 8, 120, 128, 136, 1000, 2048, 4096]),
        st.booleans(),
    ),
    max_size=12,
)


def make_chain(folder: Path, suffix: str, writes: list[tuple[int, int, int, bool]]) -> tuple[Path, bytes]:
    """A chain of three layers, written to from the base up, and its content."""
    rng, content = random.Random(2), bytearray(SIZE)
    paths = [folder / f"{name}.{suffix}" for name in ("base", "middle", "leaf")]
    for number, path in enumerate(paths):
        if number:
            vhdkit.create_child(path, paths[number - 1])
        else:
            kind = {"vhd": "dynamic", "vhdx": "vhdx", "raw": "raw"}[suffix]
            vhdkit.create_image(path, SIZE, disk_format=kind)
        with vhdkit.open_disk(path, writable=True) as disk:
            for _, sector, count, is_data in (one for one in writes if one[0] == number):
                offset, size = sector * SECTOR_SIZE, min(count, SIZE // SECTOR_SIZE - sector) * SECTOR_SIZE
                data = rng.randbytes(size) if is_data else bytes(size)
                disk.write(offset, data)
                content[offset : offset + size] = data
    return paths[2], bytes(content)


def content_of(path: Path) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
@given(writes=_writes)
@settings(max_examples=6, deadline=None)
def test_shared_and_copied_pieces_make_the_same_disk(
    suffix: str, writes: list[tuple[int, int, int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the layers own, the result reads as the chain does, and what is long and on pages is not copied."""
    folder = tmp_path_factory.mktemp("share")
    leaf, content = make_chain(folder, suffix, writes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "ioctl", FakeClone())
        for kind, name in (("raw", "out.img"), ("fixed", "out.vhd"), ("vhdx-fixed", "out.vhdx")):
            vhdkit.convert(leaf, folder / name, kind)
            assert content_of(folder / name) == content
            assert vhdkit.check(folder / name) == []


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_pieces_and_copied_runs_are_all_data_in_order(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that both files have on pages is shared, adjacent blocks as one; its edges and short runs are copied."""
    clone = FakeClone()
    monkeypatch.setattr(fcntl, "ioctl", clone)
    writes = [(0, 0, 2 * MIB // SECTOR_SIZE, True), (1, 2 * MIB // SECTOR_SIZE + 3, 1000, True), (2, 5, 8, True)]
    leaf, _ = make_chain(tmp_path, suffix, writes)
    vhdkit.create_image(tmp_path / "new.img", SIZE, disk_format="raw")
    with (
        Chain.open(leaf) as chain,
        Chain.open(tmp_path / "new.img", writable=True, options=vhdkit.OpenOptions(format_name="raw")) as new,
    ):
        assert can_share(chain, new.leaf)
        found = list(pieces_to_move(chain, new.leaf))
    at = 2 * MIB // SECTOR_SIZE
    shared = [(one.sector_index, one.sector_count) for one in found if isinstance(one, Piece)]
    copied = [one for one in found if not isinstance(one, Piece)]
    assert shared == [(16, at - 16), (at + 8, 992)]
    assert copied == [(0, 16), (at + 3, 5), (at + 1000, 3)]


@pytest.mark.parametrize("kind", ["dynamic", "vhdx"])
def test_what_allocates_finds_zeros_instead(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dynamic result is not shared: stored zeros are left out of it, as without a file system that shares."""
    monkeypatch.setattr(fcntl, "ioctl", FakeClone())
    leaf, _ = make_chain(tmp_path, "vhd", [(0, 0, 4096, True), (0, 4096, 4096, False)])
    out = tmp_path / f"out.{'vhdx' if kind == 'vhdx' else 'vhd'}"
    vhdkit.convert(leaf, out, kind, block_size_bytes=MIB)
    with Chain.open(out) as chain:
        assert chain.leaf.allocated_blocks().tolist() == [True, True, False, False, False, False]


def test_a_failure_to_share_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is full while it shares raises NoSpace, and the result does not appear."""
    leaf, _ = make_chain(tmp_path, "vhd", [(0, 0, 8192, True)])
    clone = FakeClone()

    def full(fd: int, request: int, argument: Any) -> Any:
        if clone.calls and request == FICLONERANGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return clone(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(errors.NoSpace):
        vhdkit.convert(leaf, tmp_path / "out.vhd", "fixed")
    assert sorted(tmp_path.iterdir()) == before


def test_check_names_what_hinders_sharing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that can share, blocks of another program that do not lie on pages are a note; ours do."""
    raw, odd, own = tmp_path / "disk.img", tmp_path / "qemu.vhd", tmp_path / "own.vhd"
    raw.write_bytes(random.Random(1).randbytes(SIZE))
    run([require_tool("qemu-img"), "convert", "-f", "raw", "-O", "vpc", raw, odd])
    vhdkit.convert(odd, own, "dynamic")
    monkeypatch.setattr("vhdkit.chain.verbs.sharing.may_share", lambda fd: False)
    assert vhdkit.check(odd) == []
    monkeypatch.setattr("vhdkit.chain.verbs.sharing.may_share", lambda fd: True)
    assert vhdkit.check(own) == []
    (note,) = vhdkit.check(odd)
    assert note.code == "unaligned-blocks" and note.severity is vhdkit.Severity.NOTE
    assert "not a multiple of 4096" in note.message and note.offset_bytes is not None
    assert note.offset_bytes % PAGE_SIZE


def taken_bytes(folder: Path, work: Callable[[], object]) -> int:
    """By how much the work reduces the space that is free."""
    run(["sync", "-f", folder])
    before = os.statvfs(folder)
    work()
    run(["sync", "-f", folder])
    return (before.f_bavail - os.statvfs(folder).f_bavail) * before.f_frsize


@pytest.mark.interop
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("xfs", "vhd"),
        ("btrfs", "vhdx"),
        pytest.param("xfs", "vhdx", marks=pytest.mark.nightly),
        pytest.param("btrfs", "vhd", marks=pytest.mark.nightly),
    ],
)
def test_a_real_file_system_copies_nothing(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On XFS and Btrfs conversions to raw and fixed, merges, copied layers and pulls of our images take almost no
    additional space."""
    monkeypatch.setattr("tests.vhdkit.chain.verbs.test_sharing.SIZE", 32 * MIB)
    writes = [(0, 0, 16 * MIB // SECTOR_SIZE, True), (1, 4 * MIB // SECTOR_SIZE, 8 * MIB // SECTOR_SIZE, True)]
    with file_system(tmp_path, kind) as folder:
        leaf, content = make_chain(folder, suffix, writes)
        base, new = folder / f"base.{suffix}", folder / f"new.{suffix}"
        for to, name, limit in (
            ("raw", "out.img", MIB),
            ("fixed", "out.vhd", MIB),
            ("vhdx-fixed", "out.vhdx", 18 * MIB),
        ):
            # A fixed VHDX has space for its zeros, too: 16 MiB here.
            assert taken_bytes(folder, partial(vhdkit.convert, leaf, folder / name, to)) < limit
            assert content_of(folder / name) == content
        assert taken_bytes(folder, lambda: vhdkit.merge(leaf, into=base, to=new)) < 3 * MIB
        assert content_of(new) == content
        twin, night = folder / f"twin.{suffix}", folder / f"night.a{suffix}"
        vhdkit.convert(base, twin, "vhdx" if suffix == "vhdx" else "dynamic")
        assert taken_bytes(folder, lambda: vhdkit.copy_layers(leaf, night, above=base, parent=twin)) < 3 * MIB
        assert taken_bytes(folder, lambda: vhdkit.pull(night, independent=True)) < 3 * MIB
        assert content_of(night) == content
        assert taken_bytes(folder, lambda: vhdkit.merge(leaf, into=base)) < 3 * MIB
        assert content_of(base) == content


@pytest.mark.interop
@pytest.mark.parametrize("kind", SHARING)
def test_a_shared_image_survives_a_power_cut(kind: str, tmp_path: Path) -> None:
    """What has reached the file system's device when a conversion or a merge returns is enough to read the result."""
    cut = tmp_path / "cut.img"
    with file_system(tmp_path, kind) as folder:
        leaf, content = make_chain(folder, "vhd", [(0, 0, 4096, True), (1, 4096, 4096, True), (2, 100, 8, True)])
        vhdkit.convert(leaf, folder / "out.vhd", "fixed")
        vhdkit.merge(leaf, into=folder / "base.vhd", to=folder / "new.vhd")
        copy_as_after_power_cut(tmp_path / f"{kind}.img", cut)
    with file_system(tmp_path, kind, cut) as folder:
        for name in ("out.vhd", "new.vhd"):
            assert content_of(folder / name) == content
            assert vhdkit.check(folder / name) == []
