# SPDX-License-Identifier: Apache-2.0
"""The way out of an internal switch without privileges: QEMU's user-mode network (slirp) at a port of the switch.

Decides how that helper is started: a QEMU that holds no machine, only its user-mode network and a datagram socket,
joined by a hub. It gives the guests names by DNS, reaches the host (at `host`) and what the host reaches, and forwards
ports of the host to guests. It answers DHCP, too, which nobody wants: the switch does that, and drops its answers.
What it cannot do: connections from the host to a guest other than through a forwarded port; the `bridge` back end can.
Must not know switches or frames.

The helper ends with the switch process (PR_SET_PDEATHSIG) and is started again when it ends by itself.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vmm import errors

QEMU = "qemu-system-x86_64"
PORT_NAME = "gateway"
MAX_FORWARDS = 64
_STOP_SECONDS = 2.0
_AGAIN_SECONDS = 2.0
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# Dies with its parent: the flag must be set in the child, before the helper's program replaces it.
_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 15)\n"
    "os.getppid() == int(sys.argv[1]) and os.execvp(sys.argv[2], sys.argv[2:])\n"
)


@dataclass(frozen=True, slots=True)
class GatewaySetup:
    """`network` as 10.0.7.0/24; `host` is the gateway. `first`: where its own, unwanted DHCP would begin.

    `forwards` are QEMU's: PROTOCOL:HOST_ADDRESS:HOST_PORT-GUEST_ADDRESS:GUEST_PORT.
    """

    network: str
    host: str
    name_server: str
    first: str
    domain: str = ""
    outside: bool = True
    forwards: tuple[str, ...] = ()
    host_loopback: bool = False  # whether what guests send to `host` reaches 127.0.0.1; the switch sees to it


def command(setup: GatewaySetup, peer: str, address: str) -> list[str]:
    """The helper's command line: it binds `peer` and sends to the switch's socket `address`. Pure."""
    # As JSON it is made in its turn, before the socket: who finds that one knows that all the rest is there.
    user: dict[str, Any] = {"type": "user", "id": "out", "ipv6": False, "net": setup.network, "host": setup.host}
    user |= {"dns": setup.name_server, "dhcpstart": setup.first}
    if setup.domain:
        user["domainname"] = setup.domain
    if not setup.outside:
        user["restrict"] = True
    if setup.forwards:
        user["hostfwd"] = [{"str": one} for one in setup.forwards]
    port = f"dgram,id=port,local.type=unix,local.path={peer},remote.type=unix,remote.path={address}"
    words = [QEMU, "-machine", "none", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-sandbox", _SANDBOX, "-netdev", json.dumps(user), "-netdev", "hubport,id=hub-out,hubid=0,netdev=out"]
    return [*words, "-netdev", port, "-netdev", "hubport,id=hub-port,hubid=0,netdev=port"]


class Gateway:
    """The helper of one switch; its sockets lie in the switch's folder."""

    def __init__(self, setup: GatewaySetup, folder: str) -> None:
        self.setup = setup
        self.peer = os.path.join(folder, "gateway.sock")
        self.address = os.path.join(folder, "gateway-port.sock")
        self._log = os.path.join(folder, "gateway.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    @classmethod
    def from_document(cls, document: Mapping[str, Any], folder: str) -> Gateway:
        """From JSON. Raises InvalidSpec."""
        try:
            setup = GatewaySetup(**{**document, "forwards": tuple(document.get("forwards", ()))})
            ipaddress.IPv4Network(setup.network)
            if not isinstance(setup.host_loopback, bool):
                raise ValueError("host_loopback is true or false")
            for one in (setup.host, setup.name_server, setup.first):
                ipaddress.IPv4Address(one)
            words = [setup.domain, *setup.forwards]
            if len(setup.forwards) > MAX_FORWARDS or any(not word.isascii() or "," in word for word in words):
                raise ValueError("a domain or a forwarded port has a comma, or there are too many")
        except (TypeError, ValueError) as error:
            raise errors.InvalidSpec(f"this is no gateway: {error}") from error
        return cls(setup, folder)

    def to_document(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self.setup), "forwards": list(self.setup.forwards)}

    def start(self) -> None:
        """Start the helper. Raises Unsupported where QEMU is not installed."""
        program = shutil.which(QEMU)
        if program is None:
            raise errors.Unsupported(f"{QEMU} is not installed", hint="apt-get install qemu-system-x86")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.peer)
        words = command(self.setup, self.peer, self.address)
        words = [sys.executable, "-I", "-c", _WITH_PARENT, str(os.getpid()), program, *words[1:]]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._started_at = time.monotonic()

    def keep_alive(self) -> None:
        """Start it again if it ended, not more often than every few seconds."""
        ended = self._process is None or self._process.poll() is not None
        if ended and time.monotonic() - self._started_at > _AGAIN_SECONDS:
            with contextlib.suppress(errors.Unsupported):
                self.start()

    def status(self, connected: bool) -> dict[str, Any]:
        """Whether it runs, and takes frames; and what it said when it does not run."""
        running = self._process is not None and self._process.poll() is None
        said = ""
        if not running:
            with contextlib.suppress(OSError), open(self._log, encoding="utf-8", errors="replace") as log:
                said = log.read(2000).strip()
        pid = self._process.pid if running and self._process is not None else None
        return {"pid": pid, "running": running, "ready": running and connected, "said": said, **self.to_document()}

    def stop(self) -> None:
        """End the helper and take its socket away."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with contextlib.suppress(OSError):
            os.unlink(self.peer)
