# SPDX-License-Identifier: Apache-2.0
"""Files that are read as a whole keep their size.

Decides that a disk read to its end was there to its end. A program that respects no lock can cut a file off; what is
missing then reads as zeros, because files may end before the disk does. Must not know what the bytes are read for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vhdkit import errors
from vhdkit.chain.engine.chain import Chain


@contextlib.contextmanager
def steady(chain: Chain) -> Iterator[None]:
    """Raises IoFailed at the end if a file of the chain has become smaller meanwhile."""
    sizes = [layer.store.size() for layer in chain.layers]
    yield
    for layer, expected in zip(chain.layers, sizes, strict=True):
        found = layer.store.size()
        if found < expected:
            raise errors.IoFailed(
                "became smaller while it was read",
                path=layer.store.name,
                expected=f"{expected} bytes",
                found=f"{found} bytes",
                hint="another program changes it",
            )
