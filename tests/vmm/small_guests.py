# SPDX-License-Identifier: Apache-2.0
"""Machines with the boot-sector guest for tests: made in a moment, and reporting what they see."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

import vhdkit
from tests.vmm.guests import boot_sector
from tests.waiting import wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.host.proc import ProcessRef
from vmm.processes.worker_connection import MachineRef
from vmm.store.state import MachineState, processes_of

MIB = 1 << 20
both_kinds_nightly = pytest.mark.parametrize("kind", ["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)])
SECONDS = 60.0
PARTS = ("keeper", "worker", "server", "qemu")


def make_disk(
    folder: Path, name: str = "disk", options: boot_sector.BootOptions | None = None, *, kind: str = "vhd"
) -> Path:
    """A child NAME.avhd on NAME.vhd, which boots the guest; with another kind, NAME.avhdx on NAME.vhdx."""
    base, leaf = folder / f"{name}.{kind}", folder / f"{name}.a{kind}"
    vhdkit.create_image(base, 8 * MIB, disk_format="vhdx" if kind == "vhdx" else "dynamic")
    with vhdkit.open_disk(base, writable=True) as disk:
        boot_sector.install(disk, options or boot_sector.BootOptions(print_every=4))
    vhdkit.create_child(leaf, base)
    return leaf


def make_machine(
    manager: Manager,
    folder: Path,
    name: str = "small",
    *,
    kind: str = "vhd",
    options: boot_sector.BootOptions | None = None,
    **settings: object,
) -> Path:
    """Make a machine with such a disk; return its leaf."""
    leaf = make_disk(folder, name, options, kind=kind)
    settings = {"memory_bytes": 16 * MIB, "accelerator": "tcg", **settings}
    manager.create(name, disks=[DiskRequest(str(leaf))], **settings)  # type: ignore[arg-type]
    return leaf


def console(manager: Manager, name: str = "small") -> str:
    """Everything that the guest has printed so far."""
    try:
        return Path(manager.log_path(name, "console")).read_text(errors="replace")
    except FileNotFoundError:
        return ""


def last_tick(manager: Manager, name: str = "small") -> int:
    """The last number that the guest has printed."""
    return max((int(one) for one in re.findall(r"tick (\d+)\n", console(manager, name))), default=0)


def wait_counting(manager: Manager, name: str = "small") -> int:
    """Wait until the guest has counted on from here; return the new number."""
    before = last_tick(manager, name)
    wait_until(lambda: last_tick(manager, name) > before, f"{name} counts on from {before}: {console(manager, name)}")
    return last_tick(manager, name)


def press(manager: Manager, key: str, name: str = "small") -> None:
    """Press a key at the guest's serial console."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(SECONDS)
        link.connect(MachineRef.of(name).runtime.console)
        link.sendall(json.dumps({"type": "take", "scrollback": 0}).encode() + b"\n")
        assert json.loads(link.makefile().readline())["ok"]
        link.sendall(key.encode())
        time.sleep(0.1)  # if the test disconnects at once, the console's hub may drop the key


def processes(name: str = "small") -> dict[str, ProcessRef]:
    """The living processes of the machine."""
    return processes_of(MachineRef.of(name).runtime)


def kill_together(victims: Iterable[ProcessRef]) -> None:
    """Kill processes at one moment: none of them has time to notice the death of another and to start it again."""
    refs = list(victims)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for ref in refs:
            ref.send(number)


def wait_whole(name: str = "small", *, but: dict[str, ProcessRef] | None = None) -> dict[str, ProcessRef]:
    """Wait until all four processes live, and none of those in `but` is among them."""

    def whole() -> bool:
        now = processes(name)
        return set(now) == set(PARTS) and not set(now.values()) & set((but or {}).values())

    wait_until(whole, f"all of {PARTS} live")
    return processes(name)


def wait_state(manager: Manager, state: MachineState, name: str = "small") -> None:
    """Wait until the machine is in that state."""
    wait_until(lambda: manager.state(name) is state, f"{name} is {state}")
