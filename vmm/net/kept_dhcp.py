# SPDX-License-Identifier: Apache-2.0
"""A `user` switch's DHCP server with the file in which its leases are kept.

Decides that a lease is in the file before its client gets it, so that a switch that is killed and restarted never
assigns an address that another client has (`INV-DHCP-ONE-HOLDER`). If the file cannot be written, clients get no new
leases and keep the ones that they have. Must not know sockets.
"""

from __future__ import annotations

import logging
import time

from vmm.model import errors
from vmm.net import lease_file
from vmm.net.dhcp_message import Message, MessageType
from vmm.net.dhcp_server import DhcpServer, DhcpSetup
from vmm.net.engine import Drop, Port

_log = logging.getLogger(__name__)


class KeptDhcp:
    """The server of one switch. It starts with the leases in the file."""

    def __init__(self, setup: DhcpSetup, path: str) -> None:
        self.path = path
        self.server = DhcpServer(setup, lease_file.records(path, time.time(), setup.lease_seconds))
        self._is_writable = True

    def answer(self, port: Port, message: Message) -> bytes:
        """The frame that answers; empty if none is due."""
        server, rules = self.server, port.rules
        if not server.takes(port.name, time.monotonic()):
            port.counters.drops[Drop.DHCP_FLOOD] += 1
            return b""
        own = frozenset() if rules.spoofing else rules.addresses
        frame = server.answer(message, time.time(), port=port.name, own=own)
        if (
            server.unsaved
            and not self._save()
            and message.kind is MessageType.REQUEST
            and message.mac in server.unsaved
        ):
            return b""
        return frame

    def _save(self) -> bool:
        try:
            lease_file.write(self.path, self.server)
        except (OSError, errors.VmmError) as error:
            if self._is_writable:
                _log.error("no new leases are given out, because they cannot be saved: %s", error)
            self._is_writable = False
            return False
        self.server.was_saved()
        self._is_writable = True
        return True
