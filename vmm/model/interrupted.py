# SPDX-License-Identifier: Apache-2.0
"""What becomes of a verb whose command is interrupted (Ctrl-C): a note of the KeyboardInterrupt says so.

Decides only the wording. A request that a machine's worker has accepted is carried out even if nobody waits for it any
more; what a command does itself ends with it, and leaves nothing half done. The command line prints the notes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def goes_on_without_us(what: str, machine: str) -> Iterator[None]:
    """A worker does it: it goes on, and an event tells how it ended."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{what} goes on; vmm events {machine} tells how it ends")
        raise


@contextlib.contextmanager
def ends_with_us(what: str) -> Iterator[None]:
    """This process does it: it is over, and nothing is left of it."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{what} was given up, and nothing of it is left")
        raise
