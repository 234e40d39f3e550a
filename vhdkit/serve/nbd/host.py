# SPDX-License-Identifier: Apache-2.0
"""What a connection needs from its server. Decides nothing."""

from __future__ import annotations

import ssl
from typing import Protocol

from vhdkit.readahead import Budget
from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.jobs import Jobs
from vhdkit.serve.nbd.loop import Loop
from vhdkit.serve.nbd.memory import ClientMemory
from vhdkit.serve.nbd.options import ExportInfo, Session, TlsMode
from vhdkit.serve.nbd.scans import Scans
from vhdkit.serve.nbd.stats import Stats


class Host(Protocol):
    """The part of the server that a connection uses."""

    loop: Loop
    stats: Stats
    jobs: Jobs
    scans: Scans
    memory: ClientMemory  # what all connections make the server keep
    tls_mode: TlsMode
    tls_context: ssl.SSLContext | None
    buffer: memoryview  # received and not yet served; shared by all connections, which are served one at a time
    served: object | None  # the connection whose input is in there at the moment
    replies: memoryview  # the answers of one batch
    read_ahead: Budget  # of all clients

    def catalog(self) -> list[ExportInfo]:
        """The current exports."""
        ...

    def enter(self, session: Session) -> Export:
        """The export that the client chose."""
        ...

    def drained(self, export: Export) -> None:
        """Called when a held export has no job in flight any more."""
        ...
