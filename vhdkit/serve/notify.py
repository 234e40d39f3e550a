# SPDX-License-Identifier: Apache-2.0
"""Notifies the service manager that the server is ready, or is about to end (sd_notify).

Decides where the message goes. A missing service manager is not a failure.
"""

from __future__ import annotations

import contextlib
import os
import socket

READY = "READY=1"
STOPPING = "STOPPING=1"
_VARIABLE = "NOTIFY_SOCKET"


def notify(state: str) -> bool:
    """Send `state` to the socket that $NOTIFY_SOCKET names, a path or (with @) an abstract name; True when sent."""
    name = os.environ.get(_VARIABLE, "")
    if not name.startswith(("/", "@")) or len(name) < 2:
        return False
    address = "\0" + name[1:] if name.startswith("@") else name
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(state.encode(), os.fsencode(address))
        return True
    return False
