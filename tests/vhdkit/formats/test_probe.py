# SPDX-License-Identifier: Apache-2.0
"""How the format of a file is determined: by its content; its name only leads to refusals."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import shlex

import pytest

from tests.harness.stores import MemStore
from tests.harness.vhd_builder import FIXED, MIB, Block, Vhd, child, pattern
from vhdkit.errors import CorruptImage, CorruptReason, InvalidArgument, UnsupportedFormat
from vhdkit.formats.linear import LinearImage
from vhdkit.formats.probe import FormatName, identify, open_layer
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.fixed import FixedImage
from vhdkit.formats.vhdx.create import create as create_vhdx
from vhdkit.formats.vhdx.create import new_disk


def _store(name: str, raw: bytes) -> MemStore:
    store = MemStore(name)
    store.pwrite(0, raw)
    store.frozen = True
    return store


@pytest.mark.parametrize("name", ["a.vhd", "a.avhd", "a", "a.raw", "a.vhdx"])
def test_a_vhd_is_recognised_under_any_name(name: str) -> None:
    """The footer decides, not the suffix; fixed, dynamic and differencing are distinguished."""
    kinds = [(Vhd(size=MIB, disk_type=FIXED), FixedImage), (Vhd(), DynamicImage), (child(), DynamicImage)]
    for image, kind in kinds:
        store = image.build().store(name, frozen=True)
        assert identify(store).name == FormatName.VHD
        assert type(open_layer(store)) is kind


FOREIGN = [
    (b"QFI\xfb", "a QCOW2 image", "qemu-img convert"),
    (b"KDMV", "a VMDK image", "qemu-img convert"),
    (b"# Disk DescriptorFile\n", "a VMDK image", "qemu-img convert"),
    (b"COWD", "a VMDK image", "qemu-img convert"),
    (b"<<< Oracle VM VirtualBox Disk Image >>>", "a VDI image", "qemu-img convert"),
    (b"QED\0", "a QED image", "qemu-img convert"),
    (b"WithoutFreeSpace", "a Parallels image", "qemu-img convert"),
    (b"WithouFreSpacExt", "a Parallels image", "qemu-img convert"),
    (b"VMA\0", "a backup of Proxmox VE", "vma extract"),
    (gzip.compress(b"disk", mtime=0), "compressed (gzip)", "gunzip -k"),
    (bz2.compress(b"disk"), "compressed (bzip2)", "bunzip2 -k"),
    (bz2.compress(b""), "compressed (bzip2)", "bunzip2 -k"),
    (lzma.compress(b"disk"), "compressed (xz)", "xz -dk"),
    (b"\x28\xb5\x2f\xfd\x04\x00", "compressed (zstd)", "zstd -d"),
    (b"\x50\x2a\x4d\x18\4\0\0\0abcd\x28\xb5\x2f\xfd", "compressed (zstd)", "zstd -d"),
    (b"PK\x03\x04\x14\0", "a zip archive", "unzip"),
    (b"disk.vhd".ljust(257, b"\0") + b"ustar\x0000", "a tar (also OVA and XVA) archive", "tar -xf"),
    (b"disk.ovf".ljust(257, b"\0") + b"ustar  \0", "a tar (also OVA and XVA) archive", "tar -xf"),
    (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive", "7z x"),
    (b"EVF\x09\x0d\x0a\xff\0", "an EWF (E01) image", "ewfexport"),
]


@pytest.mark.parametrize(("begin", "name", "way_on"), FOREIGN)
@pytest.mark.parametrize("path", ["disk.vhd", "disk.raw", "a disk.img.gz"])
def test_other_files_are_never_raw_silently(begin: bytes, name: str, way_on: str, path: str) -> None:
    """Under any name the refusal says what the file is, the command that helps, and how to read it as raw."""
    store = _store(path, begin.ljust(4096, b"\0"))
    with pytest.raises(UnsupportedFormat, match=re.escape(f"is {name}")) as caught:
        identify(store)
    hint = caught.value.hint or ""
    assert way_on in hint and shlex.quote(path) in hint and "--format raw" in hint
    assert type(open_layer(store, format_name=FormatName.RAW)) is LinearImage


def test_a_hint_for_a_pipe_names_no_file() -> None:
    """Data from a pipe has no name that a suggested command could contain."""
    with pytest.raises(UnsupportedFormat) as caught:
        identify(_store("scratch", gzip.compress(b"disk", mtime=0).ljust(4096, b"\0")), by_name=False)
    assert "gunzip -k FILE" in (caught.value.hint or "")


@pytest.mark.parametrize("begin", [b"BZh9 is no block", b"LUKS\xba\xbe", b"hsqs", b"\xeb\x63\x90", b"PK", b"\x1f\x8b"])
def test_file_systems_and_the_like_are_raw_disks(begin: bytes) -> None:
    """A disk may begin with a file system, an encrypted volume or code, and with part of a magic number."""
    assert identify(_store("a.img", begin.ljust(4096, b"\0"))).name == FormatName.RAW


@pytest.mark.parametrize("name", ["a.vhd", "A.VHD", "b.avhd"])
def test_a_vhd_by_name_without_a_footer_is_never_raw(name: str) -> None:
    """A truncated VHD would read as garbage; a user who knows better must say so."""
    store = _store(name, pattern(4096))
    with pytest.raises(CorruptImage) as caught:
        open_layer(store)
    assert caught.value.reason is CorruptReason.NO_FOOTER
    assert open_layer(store, format_name=FormatName.RAW).size_bytes == 4096


def test_a_footer_filled_with_0xc7_is_named() -> None:
    """Quirk: for a killed footer without a copy the message says what was found."""
    with pytest.raises(CorruptImage, match="0xC7"):
        identify(_store("a.vhd", bytes(4096) + b"\xc7" * 512))
    assert identify(_store("a.img", bytes(4096) + b"\xc7" * 512)).name == FormatName.RAW


def test_anything_else_is_raw() -> None:
    """A file that matches no other format is a raw disk."""
    assert identify(_store("a.img", pattern(4096))).name == FormatName.RAW
    assert type(open_layer(_store("a", b"\0"))) is LinearImage


@pytest.mark.parametrize("name", ["a.vhd", "a.img"])
def test_an_empty_file_is_refused(name: str) -> None:
    """An empty file is refused under any name."""
    with pytest.raises(InvalidArgument, match="empty"):
        open_layer(MemStore(name))


def test_a_damaged_vhd_is_a_vhd_under_any_name() -> None:
    """A file with one bad footer is a damaged VHD, not a raw disk."""
    store = _store("a.img", bytes(4096) + b"conectix" + bytes(504))
    assert identify(store).name == FormatName.VHD
    with pytest.raises(CorruptImage) as caught:
        open_layer(store)
    assert caught.value.reason is CorruptReason.FOOTER_CHECKSUM


def test_ignore_bitmaps_reaches_the_layer() -> None:
    """The option reaches a dynamic disk."""
    store = Vhd(blocks={0: Block(pattern(512), bits=b"")}).build().store()
    assert open_layer(store).owned_sectors(0) is not None
    assert open_layer(store, ignore_bitmaps=True).owned_sectors(0) is None


def _vhdx(name: str) -> MemStore:
    store = MemStore(name)
    create_vhdx(store, new_disk(MIB), MIB, fixed=True)
    return store


def test_a_vhdx_whose_guest_wrote_a_footer_is_not_guessed() -> None:
    """The last sector of a VHDX may be its guest's: a file that could be a VHD too is refused until the user says."""
    store = _vhdx("a.vhdx")
    assert identify(store).name == FormatName.VHDX
    footer = Vhd(size=store.size() - 512, disk_type=FIXED).build().store("x.vhd").contents()[-512:]
    store.pwrite(store.size() - 512, footer)
    with pytest.raises(UnsupportedFormat, match="looks like a VHD and a VHDX") as caught:
        identify(store)
    assert caught.value.hint is not None and "--format vhd or --format vhdx" in caught.value.hint
    assert open_layer(store, format_name="vhdx").format_name == FormatName.VHDX


def test_a_vhd_set_is_refused_with_the_way_out() -> None:
    """A `.vhds` coordinates shared disks and holds none; the `.avhdx` beside it does."""
    with pytest.raises(UnsupportedFormat, match="VHD Set") as caught:
        identify(_store("a.vhds", b"x" * 4096))
    assert caught.value.hint is not None and ".avhdx" in caught.value.hint


def test_a_file_named_vhdx_without_its_beginning_is_refused() -> None:
    """It is damaged or something else, and never taken for a raw disk."""
    with pytest.raises(CorruptImage) as caught:
        identify(_store("a.vhdx", b"x" * 4096))
    assert caught.value.reason is CorruptReason.FILE_IDENTIFIER
