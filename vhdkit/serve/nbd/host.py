# SPDX-License-Identifier: Apache-2.0
"""What a connection needs from the server it belongs to. Decides nothing."""

from __future__ import annotations

import ssl
from typing import Protocol

from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.loop import Loop
from vhdkit.serve.nbd.options import ExportInfo, Session, TlsMode
from vhdkit.serve.nbd.stats import Stats


class Host(Protocol):
    """What a connection needs of its server."""

    loop: Loop
    stats: Stats
    job_bytes: int  # of data in the jobs of all connections
    tls_mode: TlsMode
    tls_context: ssl.SSLContext | None
    buffer: memoryview  # what is received and not yet served; one for all connections, as they are served in turn
    replies: memoryview  # what is answered in one batch

    def catalog(self) -> list[ExportInfo]:
        """The exports as they are now."""
        ...

    def enter(self, session: Session) -> Export:
        """The export that was chosen."""
        ...

    def drained(self, export: Export) -> None:
        """A held export has no job in flight any more."""
        ...
