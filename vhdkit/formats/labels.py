# SPDX-License-Identifier: Apache-2.0
"""Labels that are not in a file system's first bytes: that of NTFS is in the file $Volume, that of exFAT in the root
folder.

Decides by the boot sector where they are, without trusting it: whatever a guest wrote, a few reads of
a few KiB lead to a label of bounded length or to an empty one. Pure: gets a function that reads bytes.

Sources: the documentation of NTFS by the Linux-NTFS project (boot sector, file records, attributes $VOLUME_NAME), and
Microsoft's exFAT specification (sections 3.1 and 7.3).
"""

from __future__ import annotations

from collections.abc import Callable

from vhdkit.units import KIB, MIB, SECTOR_SIZE, is_power_of_two

_MIN_RECORD_BYTES, _MAX_RECORD_BYTES = SECTOR_SIZE, 64 * KIB
_MAX_UNIT_BYTES = 32 * MIB  # allocation unit of a file system: no format has larger ones
_VOLUME_RECORD = 3  # $Volume is always the fourth file
_VOLUME_NAME, _LAST_ATTRIBUTE = 0x60, 0xFFFFFFFF
_MAX_NAME_BYTES = 256
_EXFAT_LABEL, _EXFAT_MAX_CHARACTERS, _EXFAT_ENTRY = 0x83, 11, 32
_EXFAT_LOOKED_AT = 4 * KIB  # of the root folder: formatting programs put the label first
_EXFAT_MAX_SHIFT = 25


def ntfs_label(read: Callable[[int, int], bytes], boot: bytes) -> str:
    """The label of an NTFS whose first sector is `boot`, empty if there is none. Raises what `read` raises."""
    sector = _little(boot, 0x0B, 2)
    per_unit = boot[0x0D] if boot[0x0D] <= 0x80 else 1 << (0x100 - boot[0x0D])
    unit = sector * per_unit
    signed = int.from_bytes(boot[0x40:0x41], "little", signed=True)
    size = signed * unit if signed > 0 else 1 << -signed
    if not (is_power_of_two(size) and _MIN_RECORD_BYTES <= size <= _MAX_RECORD_BYTES):
        return ""
    if not is_power_of_two(unit) or unit > _MAX_UNIT_BYTES:
        return ""
    record = _fixed_up(read(_little(boot, 0x30, 8) * unit + _VOLUME_RECORD * size, size), size)
    position = _little(record, 0x14, 2)
    while position + 0x18 <= len(record):
        kind, length = _little(record, position, 4), _little(record, position + 4, 4)
        if kind == _LAST_ATTRIBUTE or length < 0x18:
            return ""
        if kind == _VOLUME_NAME and not record[position + 8]:  # resident, as it always is
            value = record[position : position + length][_little(record, position + 0x14, 2) :]
            return _utf16(value[: min(_little(record, position + 0x10, 4), _MAX_NAME_BYTES)])
        position += length
    return ""


def _fixed_up(raw: bytes, size: int) -> bytes:
    """A file record with the last two bytes of each sector restored; empty if the record is not whole."""
    record = bytearray(raw)
    place, count = _little(record, 4, 2), _little(record, 6, 2)
    if len(record) != size or not record.startswith(b"FILE") or count != size // SECTOR_SIZE + 1:
        return b""
    kept = record[place : place + 2 * count]
    if len(kept) != 2 * count:
        return b""
    for number in range(1, count):
        end = number * SECTOR_SIZE
        if record[end - 2 : end] != kept[:2]:  # torn while it was written
            return b""
        record[end - 2 : end] = kept[2 * number : 2 * number + 2]
    return bytes(record)


def exfat_label(read: Callable[[int, int], bytes], boot: bytes) -> str:
    """The label of an exFAT whose first sector is `boot`, empty if there is none. Raises what `read` raises."""
    heap, root = _little(boot, 88, 4), _little(boot, 96, 4)
    sector_shift, unit_shift = boot[108], boot[108] + boot[109]
    if not (9 <= sector_shift <= unit_shift <= _EXFAT_MAX_SHIFT) or root < 2:
        return ""
    size = min(1 << unit_shift, _EXFAT_LOOKED_AT)
    folder = read((heap << sector_shift) + ((root - 2) << unit_shift), size)
    for position in range(0, len(folder) - _EXFAT_ENTRY + 1, _EXFAT_ENTRY):
        kind = folder[position]
        if kind == 0:  # after the last entry
            return ""
        if kind == _EXFAT_LABEL:
            count = min(folder[position + 1], _EXFAT_MAX_CHARACTERS)
            return _utf16(folder[position + 2 : position + 2 + 2 * count])
    return ""


def _utf16(raw: bytes) -> str:
    return raw.decode("utf-16-le", "replace").split("\0", 1)[0].strip()


def _little(raw: bytes | bytearray, place: int, size: int) -> int:
    return int.from_bytes(raw[place : place + size], "little")
