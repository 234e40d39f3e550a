# SPDX-License-Identifier: Apache-2.0
"""qemu's programs on our NBD server: qemu-img, qemu-io, qemu-nbd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vhdkit
from tests.interop.disks import MIB, SECTOR, content_of
from tests.interop.nbd import KINDS, SIZE, client, owners_of_sectors, qemu_opts, served, states_of_sectors

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]
BY_KIND = pytest.mark.parametrize("kind", KINDS)


@BY_KIND
def test_convert_and_compare(tmp_path: Path, kind: str) -> None:
    """qemu-img copies our export byte by byte and finds no difference."""
    with served(tmp_path, kind) as (_, image):
        client("qemu-img", "convert", "--image-opts", qemu_opts(tmp_path), "-O", "raw", tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == image.content
        raw = f"driver=raw,file.driver=file,file.filename={tmp_path / 'copy.raw'}"
        client("qemu-img", "compare", "--image-opts", qemu_opts(tmp_path), raw)


@BY_KIND
def test_convert_into(tmp_path: Path, kind: str) -> None:
    """The image reads afterwards as qemu-img has converted into it."""
    data = bytearray(SIZE)
    data[MIB : 3 * MIB] = b"\x5a" * (2 * MIB)
    data[-700:] = b"\xa5" * 700
    (tmp_path / "in.raw").write_bytes(data)
    with served(tmp_path, kind) as (server, image):
        client(
            "qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", tmp_path / "in.raw", qemu_opts(tmp_path)
        )
        assert server.stop() == (0, "")
    assert content_of(image.path) == data


def qemu_map(folder: Path, **more: str) -> list[dict[str, object]]:
    """The map that `qemu-img map` prints for our export."""
    said = client("qemu-img", "map", "--output=json", "--image-opts", qemu_opts(folder, **more))
    found: list[dict[str, object]] = json.loads(said)
    return found


def is_data(entries: list[dict[str, object]]) -> list[int]:
    """By sector, whether the map says "data"."""
    return states_of_sectors(
        [(int(str(one["start"])), int(str(one["length"])), int(bool(one["data"]))) for one in entries]
    )


@BY_KIND
def test_maps(tmp_path: Path, kind: str) -> None:
    """Rows 38 and 40: qemu-img's map is correct; with x-dirty-bitmap it shows depth and each layer's dirty sectors."""
    with served(tmp_path, kind, "--read-only") as (_, image):
        owners = owners_of_sectors(image.path)
        for index, data in enumerate(is_data(qemu_map(tmp_path))):
            assert data or not any(image.content[index * SECTOR : (index + 1) * SECTOR])
        depth = qemu_map(tmp_path, **{"x-dirty-bitmap": "qemu:allocation-depth"})
        assert is_data(depth) == [int(owner != 0) for owner in owners]  # to qemu, 1 is a hole
        with vhdkit.open_disk(image.path) as disk:
            ids = disk.layer_ids
        for layer, name in enumerate(ids):
            dirty = qemu_map(tmp_path, **{"x-dirty-bitmap": f"qemu:dirty-bitmap:{name}"})
            assert is_data(dirty) == [int(not 0 <= owner <= layer) for owner in owners]


@BY_KIND
def test_qemu_io(tmp_path: Path, kind: str) -> None:
    """qemu-io's writes, zeros, discards and flushes have their effects, unaligned too."""
    commands = (
        "w -P 0x44 4097 777",
        "r -P 0x44 4097 777",
        "w -f -P 0x45 1M 3M",
        "r -P 0x45 1M 3M",
        "w -zu 1088k 4k",
        "r -P 0 1088k 4k",
        "w -z 2M 64k",
        "r -P 0 2M 64k",
        "discard 3M 512k",
        "flush",
        f"r 0 {SIZE}",
    )
    words = [word for command in commands for word in ("-c", command)]
    with served(tmp_path, kind) as (server, image):
        said = client("qemu-io", "--image-opts", qemu_opts(tmp_path), *words)
        assert not any(word in said for word in ("failed", "error", "verification"))
        assert server.stop() == (0, "")
    content = content_of(image.path)
    assert content[4097 : 4097 + 777] == b"\x44" * 777
    assert content[1088 * 1024 : 1092 * 1024] == bytes(4096)
    assert content[:4097] == image.content[:4097]


def test_qemu_nbd_lists(tmp_path: Path) -> None:
    """Row 17: `qemu-nbd --list` shows the export, its sizes, flags and contexts."""
    with served(tmp_path, "chain"):
        said = client("qemu-nbd", "-L", "-k", tmp_path / "sock")
    assert f"size:  {SIZE}" in said
    for word in ("multi", "fua", "df", "fast-zero", "cache", "base:allocation", "qemu:allocation-depth"):
        assert word in said, word
    assert said.count("qemu:dirty-bitmap:") == 5
