# SPDX-License-Identifier: Apache-2.0
"""ISO images for tests, as far as the code examines them: a volume descriptor, and a text at the beginning."""

from __future__ import annotations

from pathlib import Path

_DESCRIPTOR_AT = 32 << 10  # ECMA-119, 6.2.1


def make_iso(path: Path, text: str, *, size_bytes: int = 256 << 10) -> Path:
    """An image whose first sector begins with the text."""
    content = bytearray(size_bytes)
    content[: len(text)] = text.encode()
    content[_DESCRIPTOR_AT : _DESCRIPTOR_AT + 7] = b"\x01CD001\x01"
    path.write_bytes(content)
    return path
