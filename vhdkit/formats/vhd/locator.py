# SPDX-License-Identifier: Apache-2.0
"""Parent locators: the text by which a differencing image names its parent.

Decides how the eight entries and the header's parent name are decoded and written. Where the text points on this
machine is decided in `chain.names.parents`; nothing here looks at a file.

Source: specification, "Parent Locator Entry"; the encodings found in files of Hyper-V, Virtual PC for Mac and
XenServer. W2ru and W2ku are UTF-16 little-endian (the header's name is big-endian), MacX a UTF-8 file URL.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhdkit.errors import CorruptReason, printable
from vhdkit.formats.vhd.layout import LOCATOR_COUNT, PARENT_NAME_SIZE, DynamicHeader, LocatorEntry
from vhdkit.store import ReadStore
from vhdkit.units import KIB, SECTOR_SIZE, round_up

RELATIVE = b"W2ru"
ABSOLUTE = b"W2ku"
MAC = b"MacX"
OLD_RELATIVE = b"Wi2r"
OLD_ABSOLUTE = b"Wi2k"
NO_PLATFORM = b"\0\0\0\0"
MAX_LOCATOR_BYTES = 64 * KIB  # Windows allows paths of 32767 UTF-16 units

_FILE_URL = "file://"
_ENCODINGS = {
    RELATIVE: "utf-16-le",
    ABSOLUTE: "utf-16-le",
    MAC: "utf-8",
    OLD_RELATIVE: "latin-1",
    OLD_ABSOLUTE: "latin-1",
}


@dataclass(frozen=True, slots=True)
class Locator:
    """One used entry. `text` is None if it cannot be read; `fault` is then the reason."""

    slot: int
    platform_code: bytes
    data_offset_bytes: int
    data_length_bytes: int
    text: str | None
    fault: CorruptReason | None = None

    @property
    def structure(self) -> str:
        """Its name in messages."""
        return f"parent locator {self.slot + 1} ({printable(self.platform_code.decode('latin-1'))})"


def space_bytes(entry: LocatorEntry) -> int:
    """Bytes allocated for the entry's text.

    The specification counts sectors, Hyper-V and Virtual PC bytes; a value below a sector can only be sectors.
    """
    space = entry.data_space * SECTOR_SIZE if entry.data_space < SECTOR_SIZE else entry.data_space
    return max(space, entry.data_length)


def read_locators(store: ReadStore, header: DynamicHeader) -> tuple[Locator, ...]:
    """The used entries in slot order, each with its text or the reason why it has none."""
    return tuple(
        _read(store, slot, entry)
        for slot, entry in enumerate(header.parent_locators)
        if entry.platform_code != NO_PLATFORM
    )


def _read(store: ReadStore, slot: int, entry: LocatorEntry) -> Locator:
    text, fault = None, None
    if entry.data_length > MAX_LOCATOR_BYTES or (entry.platform_code in _ENCODINGS and entry.data_length == 0):
        fault = CorruptReason.LOCATOR_LENGTH
    elif entry.platform_code in _ENCODINGS:
        raw = store.pread(entry.data_offset, entry.data_length) if entry.data_offset <= store.size() else b""
        if len(raw) < entry.data_length:
            fault = CorruptReason.LOCATOR_OUTSIDE_FILE
        else:
            text = decode(entry.platform_code, raw)
            fault = CorruptReason.LOCATOR_TEXT if text is None else None
    return Locator(slot, entry.platform_code, entry.data_offset, entry.data_length, text, fault)


def decode(platform_code: bytes, raw: bytes) -> str | None:
    """The text of a locator, or None if it cannot be decoded."""
    try:
        text = raw.decode(_ENCODINGS[platform_code])
    except UnicodeDecodeError:
        return None
    text = text.split("\0", 1)[0]
    if platform_code == MAC and text.lower().startswith(_FILE_URL):
        from urllib.parse import unquote

        text = unquote(text[len(_FILE_URL) :])
        text = text.removeprefix("localhost")
    return text or None


def encode(platform_code: bytes, text: str) -> bytes:
    """What is written for `text`, the reverse of `decode`."""
    if platform_code == MAC:
        from urllib.parse import quote  # takes long, and only such locators need it

        text = _FILE_URL + quote(text)
    return text.encode(_ENCODINGS[platform_code])


def decode_parent_name(raw: bytes) -> str:
    """The header's parent name: UTF-16 big-endian, ended by NUL or by the end of its 512 bytes."""
    return raw.decode("utf-16-be", "replace").split("\0", 1)[0]


def encode_parent_name(name: str) -> bytes:
    """The 512 bytes for `name`; a longer name is truncated (the locators hold it whole)."""
    raw = name.encode("utf-16-be", "replace")[:PARENT_NAME_SIZE]
    return raw.ljust(PARENT_NAME_SIZE, b"\0")


def place_locators(
    texts: list[tuple[bytes, str]], first_offset_bytes: int
) -> tuple[tuple[LocatorEntry, ...], list[tuple[int, bytes]], int]:
    """Lay out locators one after the other from `first_offset_bytes`.

    Returns the eight entries of the header, the (offset, bytes) to write, and the first free offset. The space
    of each is stated in bytes, as Hyper-V does, and is whole sectors.
    """
    entries, writes, offset = [], [], first_offset_bytes
    for platform_code, text in texts:
        raw = encode(platform_code, text)
        space = round_up(len(raw), SECTOR_SIZE)
        entries.append(LocatorEntry(platform_code, space, len(raw), 0, offset))
        writes.append((offset, raw.ljust(space, b"\0")))
        offset += space
    entries += [LocatorEntry(NO_PLATFORM, 0, 0, 0, 0)] * (LOCATOR_COUNT - len(entries))
    return tuple(entries), writes, offset
