# SPDX-License-Identifier: Apache-2.0
"""Making the file of a VHDX smaller.

Decides when space of the file is free for something else. Space that only a guest's data used is free once nothing
refers to it any more; space of metadata only after the log was closed as well, since an entry of the log may still be
replayed over it, by some programs even one in front of the tail.
"""

from __future__ import annotations

from vhdkit.formats.vhdx.blocks import VhdxImage


def cut_end(image: VhdxImage, end_bytes: int) -> None:
    """Truncate the file to `end_bytes`, behind which nothing is in use.

    The log is closed first: its entries state how long the file is. Raises NoSpace, IoFailed, SyncFailed.
    """
    image.commit.settle()
    if end_bytes < image.store.size():
        image.store.truncate(end_bytes)
        image.commit.sync()
