# SPDX-License-Identifier: Apache-2.0
"""The tree of typed keys that every configuration of a Hyper-V machine consists of, whatever its encoding.

Decides how keys are found, how many there may be and how deep they may lie. Must not know how a file stores them, nor
what any key means.

Names are compared without regard to case. A name may occur more than once below a parent, as lists are stored like
that; the order of the file is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

MAX_KEYS = 65_536  # of one file
MAX_DEPTH = 32

Value: TypeAlias = "int | float | bool | str | bytes"


@dataclass(frozen=True, slots=True)
class Key:
    """A key with a value, or one with other keys below it.

    `value` is None for the latter, and for a key that is empty in a file that does not say of which type it is.
    """

    name: str
    value: Value | None = None
    children: tuple[Key, ...] = ()

    def all(self, name: str) -> tuple[Key, ...]:
        """Every child of that name, in the order of the file."""
        wanted = name.casefold()
        return tuple(child for child in self.children if child.name.casefold() == wanted)

    def every(self, path: str) -> tuple[Key, ...]:
        """All keys at that path, names with `/` between them; several if a name on the way occurs more than once."""
        found: tuple[Key, ...] = (self,)
        for name in path.split("/"):
            found = tuple(child for key in found for child in key.all(name))
        return found

    def at(self, path: str) -> Key | None:
        """The key at that path. None if it is missing, or if there are several."""
        found = self.every(path)
        return found[0] if len(found) == 1 else None

    def walk(self, path: str = "") -> Iterator[tuple[str, Key]]:
        """Every key below this one with its path, parents first."""
        below = [(path, iter(self.children))]
        while below:
            above, children = below[-1]
            child = next(children, None)
            if child is None:
                below.pop()
                continue
            here = f"{above}/{child.name}" if above else child.name
            yield here, child
            below.append((here, iter(child.children)))
