# SPDX-License-Identifier: Apache-2.0
"""The tree of a mount, without mounting: names, links, attributes, info.json, and errnos."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vhdkit
from tests.harness.stores import MemStore
from tests.vhdkit.formats.test_partitions import mbr, write_gpt
from vhdkit.serve.mount.tree import (
    Folder,
    Link,
    Model,
    MountTree,
    Text,
    build_file,
    build_folder,
    model_of,
    safe_name,
)
from vhdkit.serve.mount.view import View
from vhdkit.serve.opening import ExportRequest, OpenMode, open_exports

MIB = 1 << 20
SIZE = 16 * MIB
NOW = 1_700_000_000_000_000_000
Make = Callable[..., Model]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes the model of a chain `leaf.avhd` on `base.vhd` from the first bytes of its disk."""
    with ExitStack() as stack:

        def model(head: bytes = b"", *, read_only: bool = True, overlay: bool = False) -> Model:
            base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.avhd"
            vhdkit.create_image(base, SIZE, block_size_bytes=MIB)
            with vhdkit.open_disk(base, writable=True) as disk:
                disk.write(0, head or bytes(512))
            vhdkit.create_child(leaf, base, block_size_bytes=MIB)
            open_mode = OpenMode(vhdkit.OpenOptions(), read_only=read_only and not overlay, overlay=overlay)
            export = open_exports([ExportRequest(str(leaf), "disk")], open_mode)[0]
            stack.callback(export.disk.close)
            return model_of(export, NOW)

        yield model


def gpt_disk(*partitions: tuple[int, int, str]) -> bytes:
    """The first MiB of a disk with these partitions."""
    store = MemStore("gpt")
    store.truncate(SIZE)
    write_gpt(store, SIZE, *partitions)
    return store.pread(0, MIB)


def paths(tree: MountTree) -> list[str]:
    """Every name in the mount."""
    found = []

    def walk(folder: Folder, path: str) -> None:
        for name, kind in tree.names(folder):
            found.append(f"{path}/{name}")
            node = folder.entries[name]
            assert stat.S_ISDIR(kind) == isinstance(node, Folder) and stat.S_ISLNK(kind) == isinstance(node, Link)
            if isinstance(node, Folder):
                walk(node, f"{path}/{name}")

    walk(tree.folder("/"), "")
    return found


def test_the_names_of_a_mount(make: Make) -> None:
    """The disk, partitions with links by name, id and type, the layers leaf first, and the document."""
    head = bytearray(gpt_disk((2048, 4095, "Data one"), (4096, 8191, "Data one"), (8192, 9000, "..")))
    tree = build_folder(make(bytes(head)), {})
    uuid = "75757575-7575-7575-7575-757575757575"
    assert paths(tree) == [
        "/disk.raw", "/partitions", "/partitions/1.raw", "/partitions/2.raw", "/partitions/3.raw",
        "/partitions/by-label", "/partitions/by-label/Data one", "/partitions/by-label/Data one-2",
        "/partitions/by-label/\\x2e\\x2e", "/partitions/by-uuid", f"/partitions/by-uuid/{uuid}",
        "/partitions/by-type", "/partitions/by-type/linux-filesystem-1", "/partitions/by-type/linux-filesystem-2",
        "/partitions/by-type/linux-filesystem-3", "/layers", "/layers/0-leaf.raw", "/layers/1-base.raw", "/info.json",
    ]  # fmt: skip
    assert tree.target("/partitions/by-label/Data one-2") == "../2.raw"
    assert tree.count() == 20


def test_extended_partitions(make: Make) -> None:
    """Logical partitions of an MBR have the numbers that Linux gives them."""
    head = bytearray(MIB)
    head[:512] = mbr((0x83, 64, 64), (0x05, 1024, 1024))
    head[1024 * 512 : 1025 * 512] = mbr((0x07, 8, 100), (0x05, 200, 100))
    head[1224 * 512 : 1225 * 512] = mbr((0x83, 8, 50))
    model = make(bytes(head))
    assert [one.partition.number for one in model.partitions] == [1, 2, 5, 6]
    view = build_folder(model, {}).find("/partitions/6.raw")
    assert isinstance(view, View) and (view.offset_bytes, view.size_bytes) == (1232 * 512, 50 * 512)


def test_partitions_that_extend_behind_the_disk(make: Make) -> None:
    """INV-BOUNDED: the ranges of a false table are cut to the disk; one entirely outside has no file."""
    model = make(mbr((0x83, 64, 0xFFFFFFFF), (0x83, 0xFFFFFF00, 10)))
    assert [(one.partition.number, one.size_bytes) for one in model.partitions] == [(1, SIZE - 64 * 512)]
    tree = build_folder(model, {})
    text = tree.find("/info.json")
    assert isinstance(text, Text) and json.loads(text.content)["partitions"][0]["cut_off"] is True


def test_attributes(make: Make) -> None:
    """Types, permissions, sizes, and block counts that exclude holes."""
    tree = build_folder(make(gpt_disk((2048, 4095, "x"))), {})
    disk = tree.attributes(tree.find("/disk.raw"))
    assert stat.S_ISREG(disk.mode) and disk.mode & 0o777 == 0o444 and disk.size_bytes == SIZE
    assert 0 < disk.allocated_bytes <= MIB
    root = tree.attributes(tree.root)
    assert stat.S_ISDIR(root.mode) and root.link_count == 4 and root.modified_ns == NOW
    link = tree.attributes(tree.find("/partitions/by-label/x"))
    assert stat.S_ISLNK(link.mode) and link.size_bytes == len("../1.raw")


def test_writable_mounts(make: Make) -> None:
    """The disk and its partitions can be written to, its layers cannot; a write changes the time of all of them."""
    tree = build_folder(make(gpt_disk((2048, 4095, "x")), read_only=False), {})
    assert tree.is_writable
    disk, layer = tree.find("/disk.raw"), tree.find("/layers/0-leaf.raw")
    assert isinstance(disk, View) and isinstance(layer, View)
    assert tree.attributes(disk).mode & 0o777 == 0o644 and tree.attributes(layer).mode & 0o777 == 0o444
    before = tree.attributes(layer).modified_ns
    partition = tree.open("/partitions/1.raw", write=True)
    assert not isinstance(partition, Text)
    partition.write(0, memoryview(b"hello"))
    buffer = memoryview(bytearray(5))
    for path, offset in (("/disk.raw", 2048 * 512), ("/layers/0-leaf.raw", 2048 * 512)):
        assert tree.open(path, write=False).read_into(offset, buffer) == 5 and bytes(buffer) == b"hello"
    base = tree.open("/layers/1-base.raw", write=False)
    base.read_into(2048 * 512, buffer)
    assert bytes(buffer) == bytes(5)
    assert tree.attributes(layer).modified_ns > before


def test_a_temporary_overlay_is_not_a_layer(make: Make) -> None:
    """If changes are discarded, the layers are the image's own and show it unchanged."""
    tree = build_folder(make(b"old".ljust(512, b"\0"), overlay=True), {})
    assert [path for path in paths(tree) if path.startswith("/layers/")] == [
        "/layers/0-leaf.raw",
        "/layers/1-base.raw",
    ]
    disk = tree.open("/disk.raw", write=True)
    assert not isinstance(disk, Text)
    disk.write(0, memoryview(b"new"))
    buffer = memoryview(bytearray(3))
    tree.open("/layers/0-leaf.raw", write=False).read_into(0, buffer)
    assert bytes(buffer) == b"old"


def test_refusals(make: Make) -> None:
    """Each refused call has its errno."""
    tree = build_folder(make(), {})
    for code, call in (
        (errno.ENOENT, lambda: tree.find("/nothing")),
        (errno.ENOTDIR, lambda: tree.find("/disk.raw/deeper")),
        (errno.ENOTDIR, lambda: tree.folder("/disk.raw")),
        (errno.EISDIR, lambda: tree.open("/layers", write=False)),
        (errno.EACCES, lambda: tree.open("/disk.raw", write=True)),
        (errno.EACCES, lambda: tree.open("/info.json", write=True)),
        (errno.EACCES, lambda: tree.truncate("/disk.raw", 0)),
        (errno.EINVAL, lambda: tree.target("/disk.raw")),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == code


def test_the_document(make: Make, tmp_path: Path) -> None:
    """info.json describes everything in one place."""
    tree = build_folder(make(gpt_disk((2048, 4095, "x"))), {"mounted_at": "/mnt"})
    handle = tree.open("/info.json", write=False)
    buffer = bytearray(1 << 16)
    facts = json.loads(buffer[: handle.read_into(0, memoryview(buffer))])
    assert facts["image"] == str(tmp_path / "leaf.avhd") and facts["size_bytes"] == SIZE
    assert facts["partition_table"] == "gpt" and facts["mounted_at"] == "/mnt" and facts["writable"] is False
    (partition,) = facts["partitions"]
    assert (partition["file"], partition["offset_bytes"]) == ("partitions/1.raw", MIB)
    assert [layer["file"] for layer in facts["layers"]] == ["layers/0-leaf.raw", "layers/1-base.raw"]
    assert all(len(layer["id"]) == 36 for layer in facts["layers"])
    assert handle.read_into(10**6, memoryview(buffer)) == 0


def test_one_file(make: Make) -> None:
    """The mount may consist of the disk, or of one partition, alone."""
    model = make(gpt_disk((2048, 4095, "x")))
    assert build_file(model, None).attributes(build_file(model, None).root).size_bytes == SIZE
    assert build_file(model, 1).attributes(build_file(model, 1).root).size_bytes == MIB
    with pytest.raises(vhdkit.InvalidArgument, match="has no partition 7; it has 1"):
        build_file(model, 7)


@given(st.text(max_size=300), st.sampled_from(["", ".raw", "-12"]))
def test_any_name_is_a_file_name(text: str, ending: str) -> None:
    """Guests choose partition names: they never lead elsewhere, nor are they too long or unprintable."""
    name = safe_name(text, ending)
    assert name and name not in (".", "..") and "/" not in name and "\0" not in name
    assert len(os.fsencode(name)) <= 255 and name.isprintable() and name.endswith(ending)
