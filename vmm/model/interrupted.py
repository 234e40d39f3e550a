# SPDX-License-Identifier: Apache-2.0
"""What happens to an operation when its command is interrupted (Ctrl-C): a note on the KeyboardInterrupt says so.

Decides only the wording. A request that a machine's worker has accepted is carried out even if its caller stops
waiting; work done in the command's own process ends with it and leaves nothing half-done. The command line prints the
notes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def goes_on_without_us(what: str, machine: str) -> Iterator[None]:
    """For work done by a worker: it continues, and an event reports the outcome."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{what} continues; vmm events {machine} shows how it ends")
        raise


@contextlib.contextmanager
def ends_with_us(what: str) -> Iterator[None]:
    """For work done by this process: it is abandoned, and nothing of it is left."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{what} was abandoned and left nothing behind")
        raise
