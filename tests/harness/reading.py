# SPDX-License-Identifier: Apache-2.0
"""Which bytes of which files are read and prefetched: a record of the calls of a class of stores."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


class Touched:
    """Bytes of files, by the files' identities."""

    def __init__(self) -> None:
        self._ranges: list[tuple[Hashable, int, int]] = []

    def add(self, identity: Hashable, offset_bytes: int, size_bytes: int) -> None:
        """Record a range."""
        if size_bytes:
            self._ranges.append((identity, offset_bytes, offset_bytes + size_bytes))

    def clear(self) -> None:
        """Forget everything."""
        self._ranges.clear()

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def merged(self) -> list[tuple[Hashable, int, int]]:
        """The ranges in order, with overlapping and adjacent ones joined."""
        joined: list[tuple[Hashable, int, int]] = []
        for identity, start, stop in sorted(self._ranges, key=lambda one: (hash(one[0]), one[1])):
            if joined and joined[-1][0] == identity and start <= joined[-1][2]:
                joined[-1] = identity, joined[-1][1], max(stop, joined[-1][2])
            else:
                joined.append((identity, start, stop))
        return joined

    def covers(self, other: Touched) -> bool:
        """Whether every byte of `other` is among these."""
        whole = self.merged()
        return all(
            any(a == one and low <= start and stop <= high for a, low, high in whole)
            for one, start, stop in other.merged()
        )


@contextmanager
def recorded(kind: type[Any]) -> Iterator[tuple[Touched, Touched]]:
    """What is read from stores of this class in the block, and what is prefetched."""
    read, prefetched = Touched(), Touched()

    def wrapped(name: str, record: Touched, size_of: Callable[[Any], int]) -> Callable[..., Any]:
        method = getattr(kind, name)

        def call(self: Any, offset_bytes: int, what: Any) -> Any:
            record.add(self.identity, offset_bytes, size_of(what))
            return method(self, offset_bytes, what)

        return call

    with (
        mock.patch.object(kind, "pread", wrapped("pread", read, int)),
        mock.patch.object(kind, "pread_into", wrapped("pread_into", read, len)),
        mock.patch.object(kind, "try_pread_into", wrapped("try_pread_into", read, len)),
        mock.patch.object(kind, "prefetch", wrapped("prefetch", prefetched, int)),
    ):
        yield read, prefetched
