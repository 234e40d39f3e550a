# SPDX-License-Identifier: Apache-2.0
"""Talking to a machine's disk server."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from vmm.kvm.drives import DiskServer
from vmm.model.paths import RuntimePaths


def test_a_call_that_is_cancelled_holds_up_nothing(short_path: Path) -> None:
    """A server that takes a request and never answers, as one that hangs with a file system, keeps no thread of ours:
    the process can end."""
    runtime = RuntimePaths(str(short_path))

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        calling = asyncio.create_task(DiskServer(runtime).call("pull", timeout_seconds=3600))
        server, _ = await loop.sock_accept(listener)
        assert await loop.sock_recv(server, 1)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await asyncio.wait_for(loop.shutdown_default_executor(), 20)
        server.close()

    with socket.socket(socket.AF_UNIX) as listener:
        os.makedirs(os.path.dirname(runtime.nbd_control), exist_ok=True)
        listener.bind(runtime.nbd_control)
        listener.listen()
        listener.setblocking(False)
        asyncio.run(scene())
