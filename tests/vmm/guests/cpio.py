# SPDX-License-Identifier: Apache-2.0
"""An initial RAM file system: the "newc" archive that Linux unpacks (its Documentation/driver-api/early-userspace)."""

from __future__ import annotations

import stat

_ALIGNMENT = 4


class Archive:
    """Collects entries in the order in which the kernel should make them."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._count = 0
        self._folders: set[str] = set()

    def folder(self, path: str) -> None:
        """Add a folder, and the folders it lies in."""
        parts = path.strip("/").split("/")
        for length in range(1, len(parts) + 1):
            name = "/".join(parts[:length])
            if name and name not in self._folders:
                self._folders.add(name)
                self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, path: str, content: bytes, *, executable: bool = False) -> None:
        """Add a file, and the folders it lies in."""
        self.folder(path.rpartition("/")[0])
        self._entry(path.strip("/"), stat.S_IFREG | (0o755 if executable else 0o644), content)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self.folder(path.rpartition("/")[0])
        self._entry(path.strip("/"), stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int) -> None:
        """Add a character device."""
        self.folder(path.rpartition("/")[0])
        self._entry(path.strip("/"), stat.S_IFCHR | 0o600, b"", major, minor)

    def finished(self) -> bytes:
        """The archive with its end marker."""
        self._entry("TRAILER!!!", 0, b"")
        return bytes(self._data)

    def _entry(self, name: str, mode: int, content: bytes, major: int = 0, minor: int = 0) -> None:
        self._count += 1
        raw_name = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(raw_name), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + raw_name
        self._pad()
        self._data += content
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % _ALIGNMENT)
