# SPDX-License-Identifier: Apache-2.0
"""The DHCP and name server of an internal switch on the bridge back end: dnsmasq.

Decides its configuration (pure: `configuration`), and that each switch has one process, identified by pid and start
time, which is replaced when the configuration changes. Guests talk to it, so it runs as a user of its own, enclosed.
Leases outlive it. Must not know bridges or guests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import time
from typing import Any

from vmm.host.proc import ProcessRef, command_words, spawn_detached
from vmm.host.users import user_of
from vmm.model import errors, paths
from vmm.model.waiting import LOOK_SECONDS
from vmm.net import enclosed, lease_file, records
from vmm.net.dhcp_server import LEASE_SECONDS
from vmm.net.enclosing import Enclosure, hint_for
from vmm.net.switch_spec import SwitchSpec

DNSMASQ_HINT = "apt-get install dnsmasq-base"
_CONFIG, _NOTE, _LOG = "dnsmasq.conf", "dnsmasq.json", "dnsmasq.log"
_READY, _LEASES = "ready", "leases"
_GRACE_SECONDS = 3.0
_START_SECONDS = 10.0
_LOG_BYTES = 64 << 10
_CAPABILITIES = (
    10,
    12,
    13,
)  # CAP_NET_BIND_SERVICE, _NET_ADMIN (ARP for clients), _NET_RAW (on the bridge alone; ping)
_started: set[int] = set()  # pids of our children, which stay valid until `_bury` collects them


def _bury() -> None:
    """Collect the exit status of servers that this process started and that have ended."""
    for pid in list(_started):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        _started.discard(pid)


def configuration(spec: SwitchSpec, lease_path: str) -> str:
    """The configuration file of dnsmasq. It listens and answers only on the bridge's address."""
    first, last = spec.dhcp_range
    lines = [
        "no-hosts",
        "bind-interfaces",
        f"interface={spec.bridge_name}",
        "except-interface=lo",
        f"listen-address={spec.interface.ip}",
        f"domain={spec.domain},{spec.network}",
        f"local=/{spec.domain}/",
        "expand-hosts",
        "dhcp-authoritative",
        f"dhcp-range={first},{last},{spec.network.netmask},{LEASE_SECONDS}",
        f"dhcp-option=option:dns-server,{spec.interface.ip}",
        f"dhcp-leasefile={lease_path}",  # the path that the enclosed server sees
        f"dhcp-lease-max={spec.network.num_addresses}",
        f"host-record=host.{spec.domain},{spec.interface.ip}",
    ]
    # Without a way out, guests have no server for other names and no router.
    lines += (
        [f"dhcp-option=option:router,{spec.interface.ip}"] if spec.nat else ["no-resolv", "dhcp-option=option:router"]
    )
    if spec.mtu_bytes is not None:  # the only way in which legacy adapters learn it
        lines.append(f"dhcp-option=option:mtu,{spec.mtu_bytes}")
    for lease in spec.leases:
        name = f",{lease.name}" if lease.name else ""
        lines.append(f"dhcp-host={lease.mac},{lease.address}{name}")
    return "\n".join(lines) + "\n"


class Dnsmasq:
    """The server of one switch; its files are in the switch's runtime folder, its leases in the folder of switches."""

    def __init__(self, spec: SwitchSpec, folder: str, lease_path: str) -> None:
        self._spec = spec
        self._folder = folder
        self._lease_path = lease_path
        self._place = Enclosure(self._in("dns"), user_of(spec.id), self._in("dns-root"))

    def _in(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def process(self) -> ProcessRef | None:
        """The running server, if any."""
        try:
            ref = ProcessRef.from_document(records.read_object(self._in(_NOTE)))
        except (OSError, ValueError):
            return None
        return ref if ref is not None and ref.is_alive() else None

    def _all(self) -> list[ProcessRef]:
        """Every server with our configuration, including one whose starter was killed before it could record it."""
        sign = f"--conf-file={self._in(_CONFIG)}"
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [ref for pid in pids if sign in command_words(pid) and (ref := ProcessRef.of(pid)) is not None]

    def ensure(self) -> None:
        """Run it with the present configuration. Raises Unsupported, or VmmError with its message."""
        program = shutil.which("dnsmasq", path="/usr/sbin:/sbin:/usr/bin:/bin")
        if program is None:
            raise errors.Unsupported("dnsmasq is not installed", hint=DNSMASQ_HINT)
        path = self._lease_path if self._place.user is None else f"/{_LEASES}"
        wanted = configuration(self._spec, path).encode()
        with contextlib.suppress(OSError, ValueError):
            if records.read_bytes(self._in(_CONFIG)) == wanted and self.process() is not None:
                return
        self.stop()
        paths.write_whole(self._in(_CONFIG), wanted, mode=0o644, durable=False)
        os.chmod(self._in(_CONFIG), 0o644)  # it reads this as its own user, whatever umask its starter has
        options = [
            "--keep-in-foreground",
            f"--conf-file={self._in(_CONFIG)}",
            f"--pid-file={self._place.seen(_READY)}",
        ]
        checked = subprocess.run([program, "--test", *options[1:]], capture_output=True, text=True, check=False)
        if checked.returncode != 0:
            raise errors.VmmError(f"dnsmasq rejects its configuration: {checked.stderr.strip()}")
        # dnsmasq already runs as this user, and looks up the name.
        user = "root" if self._place.user is None else enclosed.USER_NAME
        words = [program, *options, f"--user={user}", f"--group={user}"]
        pid = spawn_detached(self._enclosed(words), log_path=self._in(_LOG))
        _started.add(pid)
        ref = ProcessRef.of(pid)
        if ref is None or self._ended_at_once(ref):
            said = records.read_tail(self._in(_LOG), _LOG_BYTES).splitlines() or ["it gave no reason"]
            problem = said[-1].strip().removeprefix("dnsmasq: ")
            raise errors.VmmError(f"the DHCP server did not start: {problem}", hint=hint_for(problem))
        paths.write_whole(self._in(_NOTE), json.dumps(ref.to_document()).encode(), durable=False)

    def _enclosed(self, words: list[str]) -> list[str]:
        """The command, enclosed: its own user, three capabilities, its configuration, and its own file of leases."""
        try:
            self._place.make()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._place.folder, _READY))
            leases = os.open(self._lease_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                facts = os.fstat(leases)
                if not stat.S_ISREG(facts.st_mode) or facts.st_size > lease_file.MAX_FILE_BYTES:
                    raise errors.VmmError(
                        f"the leases are damaged: not a regular file of at most {lease_file.MAX_FILE_BYTES} bytes",
                        path=self._lease_path,
                        hint="remove it; guests then get new addresses",
                    )
                if self._place.user is not None:
                    os.fchown(leases, self._place.user, self._place.user)
            finally:
                os.close(leases)
        except OSError as error:
            raise errors.of_os_error(error, "prepare the DHCP server", path=self._folder) from error
        files = [f"{self._lease_path}={_LEASES}"]
        return self._place.command(words, keep=_CAPABILITIES, files=files, read=[self._in(_CONFIG)])

    def refresh(self) -> None:
        """Copy the host's current name servers to it."""
        self._place.refresh()

    def _ended_at_once(self, ref: ProcessRef) -> bool:
        """True if it ended at once. It reports that it runs once its sockets are bound; failures come before that."""
        ready = os.path.join(self._place.folder, _READY)
        deadline = time.monotonic() + _START_SECONDS
        ended = False
        while not ended and not os.path.lexists(ready) and time.monotonic() < deadline:
            ended = ref.wait(LOOK_SECONDS)
        _bury()
        return ended

    def leases(self) -> list[dict[str, Any]]:
        """The current leases: mac, address, name, expires (seconds since 1970)."""
        return lease_file.read(self._lease_path)

    def stop(self) -> None:
        """End it; succeeds if it does not run."""
        for ref in self._all():
            ref.end(_GRACE_SECONDS)
        _bury()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._in(_NOTE))
