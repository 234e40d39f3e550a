# SPDX-License-Identifier: Apache-2.0
"""Which format a file is taken for: by what stands in it, and by its name only to refuse."""

from __future__ import annotations

import pytest

from tests.stores import MemStore
from tests.vhd_builder import FIXED, MIB, Block, Vhd, child, pattern
from vhdkit.errors import CorruptImage, CorruptReason, InvalidArgument, UnsupportedFormat
from vhdkit.formats.linear import LinearImage
from vhdkit.formats.probe import FormatName, identify, open_layer
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.fixed import FixedImage


def _store(name: str, raw: bytes) -> MemStore:
    store = MemStore(name)
    store.pwrite(0, raw)
    store.frozen = True
    return store


@pytest.mark.parametrize("name", ["a.vhd", "a.avhd", "a", "a.raw", "a.vhdx"])
def test_a_vhd_is_one_under_any_name(name: str) -> None:
    """Footers decide, not the suffix; fixed, dynamic and differencing are told apart."""
    kinds = [(Vhd(size=MIB, disk_type=FIXED), FixedImage), (Vhd(), DynamicImage), (child(), DynamicImage)]
    for image, kind in kinds:
        store = image.build().store(name, frozen=True)
        assert identify(store) is FormatName.VHD
        assert type(open_layer(store)) is kind


@pytest.mark.parametrize(
    ("magic", "name"),
    [
        (b"vhdxfile", "VHDX"),
        (b"QFI\xfb", "QCOW2"),
        (b"KDMV", "VMDK"),
        (b"# Disk DescriptorFile\n", "VMDK"),
        (b"COWD", "VMDK"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>", "VDI"),
        (b"QED\0", "QED"),
    ],
)
def test_other_formats_are_refused_by_name(magic: bytes, name: str) -> None:
    """The refusal says what the file is and how to read it as raw all the same."""
    store = _store("disk.vhd", magic.ljust(4096, b"\0"))
    with pytest.raises(UnsupportedFormat, match=f"is a {name} image") as caught:
        identify(store)
    assert "--format raw" in (caught.value.hint or "")
    assert type(open_layer(store, format_name=FormatName.RAW)) is LinearImage


@pytest.mark.parametrize("name", ["a.vhd", "A.VHD", "b.avhd"])
def test_a_vhd_by_name_without_a_footer_is_never_raw(name: str) -> None:
    """A VHD cut short would read as garbage; whoever knows better says so."""
    store = _store(name, pattern(4096))
    with pytest.raises(CorruptImage) as caught:
        open_layer(store)
    assert caught.value.reason is CorruptReason.NO_FOOTER
    assert open_layer(store, format_name=FormatName.RAW).size_bytes == 4096


def test_a_footer_filled_with_0xc7_is_named() -> None:
    """Quirk: of a killed footer without a copy the message says what was found."""
    with pytest.raises(CorruptImage, match="0xC7"):
        identify(_store("a.vhd", bytes(4096) + b"\xc7" * 512))
    assert identify(_store("a.img", bytes(4096) + b"\xc7" * 512)) is FormatName.RAW


def test_anything_else_is_raw() -> None:
    """A file that looks like nothing else is a disk."""
    assert identify(_store("a.img", pattern(4096))) is FormatName.RAW
    assert type(open_layer(_store("a", b"\0"))) is LinearImage


@pytest.mark.parametrize("name", ["a.vhd", "a.img"])
def test_an_empty_file_is_refused(name: str) -> None:
    """Under any name."""
    with pytest.raises(InvalidArgument, match="empty"):
        open_layer(MemStore(name))


def test_a_damaged_vhd_is_a_vhd_under_any_name() -> None:
    """One bad footer and nothing else is a damaged VHD, not a raw disk."""
    store = _store("a.img", bytes(4096) + b"conectix" + bytes(504))
    assert identify(store) is FormatName.VHD
    with pytest.raises(CorruptImage) as caught:
        open_layer(store)
    assert caught.value.reason is CorruptReason.FOOTER_CHECKSUM


def test_ignore_bitmaps_reaches_the_layer() -> None:
    """The option arrives at a dynamic disk."""
    store = Vhd(blocks={0: Block(pattern(512), bits=b"")}).build().store()
    assert open_layer(store).owned_sectors(0) is not None
    assert open_layer(store, ignore_bitmaps=True).owned_sectors(0) is None
