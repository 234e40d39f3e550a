# SPDX-License-Identifier: Apache-2.0
"""Real machines for network tests: made with the Manager in the test's folders, and ended whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.vmm.guests.shell import GuestShell, Result
from vmm.api.manager import Manager
from vmm.kvm.console import open_console
from vmm.model.errors import VmmError
from vmm.net import switches
from vmm.store import registry
from vmm.store.state import processes_of

_NEW_NET = 0x40000000  # CLONE_NEWNET


class MachineLab:
    """A home and a runtime folder, with the machines and switches in them."""

    def __init__(self, monkeypatch: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmm-lan-"))
        self.folder.chmod(0o755)
        monkeypatch.setenv("VMM_HOME", str(self.folder / "home"))
        monkeypatch.setenv("VMM_RUNTIME", str(self.folder / "run"))
        self.manager = Manager()
        self.links: list[socket.socket] = []

    def start(self, name: str, *nics: dict[str, Any], **settings: Any) -> GuestShell:
        """Start a Linux guest with these adapters, and wait until it answers."""
        self.define(name, *nics, **settings)
        self.manager.start(name)
        return self.shell(name)

    def define(self, name: str, *nics: dict[str, Any], **settings: Any) -> None:
        """Define a machine that boots the Linux guest, unless the arguments say otherwise."""
        from tests.vmm.guests.linux import linux_guest

        guest = linux_guest()
        usual: dict[str, Any] = {
            "kernel": str(guest.kernel),
            "initrd": str(guest.initrd),
            "append": guest.append,
            "memory_bytes": 192 << 20,
            "screen": False,
            "accelerator": "tcg",
        }
        self.manager.create(name, adapters=nics, **(usual | settings))

    def shell(self, name: str) -> GuestShell:
        """Run commands in a running guest."""
        link = open_console(registry.load(name).runtime.console, typing="shared", scrollback_bytes=0)[0]
        self.links.append(link)
        shell = GuestShell(link)
        shell.wait_ready()
        return shell

    def close(self) -> None:
        """End everything."""
        for link in self.links:
            link.close()
        for name in self.manager.names():
            with contextlib.suppress(VmmError):
                self.manager.stop(name)
            with contextlib.suppress(VmmError):
                for ref in processes_of(registry.load(name).runtime).values():
                    ref.send(signal.SIGKILL)
        for spec in switches.load_all():
            with contextlib.suppress(VmmError):
                switches.delete(spec.name, force=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def address(shell: GuestShell, cidr: str, interface: str = "eth0") -> None:
    """Give a guest an address."""
    shell.check(f"ip link set {interface} up && ip addr add {cidr} dev {interface}")


def ping(shell: GuestShell, target: str, seconds: int = 10) -> Result:
    """Ping; one answer within that time is enough, and a request that is lost is repeated."""
    each = min(3, seconds)
    tries = f"for i in $(seq {-(-seconds // each)}); do ping -c 1 -w {each} {target} && exit 0; done; exit 1"
    return shell.run(f"({tries})", seconds=seconds + 20)


def lease(shell: GuestShell, interface: str = "eth0") -> str:
    """Have a guest request an address by DHCP; return the address."""
    script = "/usr/share/udhcpc/default.script"
    shell.check(f"ip link set {interface} up; udhcpc -i {interface} -s {script} -n -q -t 10", seconds=60)
    return shell.check(f"ip -4 -o addr show {interface} | awk '{{print $4}}'").partition("/")[0]


class Namespaces:
    """Network namespaces with unique names, removed with everything in them."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add(self, word: str) -> str:
        """Make a namespace, with its loopback up."""
        name = f"vmmt-{os.getpid()}-{word}"
        subprocess.run(["ip", "netns", "add", name], check=True)
        self.names.append(name)
        self.run(name, "ip link set lo up")
        return name

    def run(self, name: str, command: str, *, check: bool = True, timeout: float = 60) -> str:
        """Run a shell command in it; return its output."""
        done = subprocess.run(
            ["ip", "netns", "exec", name, "sh", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Move this thread into it, for sockets and for programs that it starts; /sys still shows the outside."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net", encoding="ascii") as outside:
            with open(f"/run/netns/{name}", encoding="ascii") as there:
                assert libc.setns(there.fileno(), _NEW_NET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(outside.fileno(), _NEW_NET) == 0, os.strerror(ctypes.get_errno())

    def close(self) -> None:
        """Kill the processes in them, and remove them."""
        for name in self.names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in pids.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
