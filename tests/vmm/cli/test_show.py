# SPDX-License-Identifier: Apache-2.0
"""`vmm list` and `vmm show`: adapters with their addresses, and changes that take effect at the next start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.vmm.small_guests import make_machine
from vmm.api.manager import MachineInfo, Manager
from vmm.cli.main import main
from vmm.cli.show import _duration, addresses_of
from vmm.model.guest import GuestInfo, GuestInterface
from vmm.model.spec import make_adapter, make_spec
from vmm.net import switches
from vmm.net.switch_spec import make_switch
from vmm.store.state import MachineState

MIB = 1 << 20


def output(*words: str) -> str:
    """Run a command that succeeds; return its output."""
    done = CliRunner().invoke(main, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.kvm
def test_a_running_machine_that_was_changed(manager: Manager, tmp_path: Path) -> None:
    """Both commands show what it has now and mark what it will have; with --json there is a field for each."""
    switches.create(make_switch(name="lab"))
    try:
        make_machine(manager, tmp_path, adapters=[{"switch": "lab", "mac": "02:00:00:00:00:05"}])
        assert "machine is off" in output("show", "small")
        assert json.loads(output("show", "small", "--json"))["running"] is None
        manager.start("small")
        manager.set("small", memory_bytes=32 * MIB, cpu_count=2, notes="changed at once")
        shown = output("show", "small")
        assert "16.0 MiB (32.0 MiB at next start)" in shown and "1 (2 at next start)" in shown
        assert "02:00:00:00:00:05" in shown and "connected" in shown
        listed = output("list")
        assert "16.0 MiB" in listed and "at next start: 2 cpus, 32.0 MiB" in listed and "lab" in listed
        (document,) = json.loads(output("list", "--json"))
        assert document["definition"]["memory_bytes"] == 32 * MIB
        assert document["running"]["memory_bytes"] == 16 * MIB
        assert document["at_next_start"] == {"memory_bytes": 32 * MIB, "cpu_count": 2}
        assert document["adapters"] == [
            {"id": "nic-0", "switch": "lab", "mac": "02:00:00:00:00:05", "connected": True, "connection": "connected",
             "addresses": []}
        ]  # fmt: skip
        manager.stop("small")
        assert "next start" not in output("show", "small") and "32.0 MiB" in output("show", "small")
    finally:
        for spec in switches.load_all():
            switches.delete(spec.name, force=True)


def test_addresses_belong_to_adapters() -> None:
    """A guest's interface belongs to the adapter with its MAC address, in whatever case; link-local addresses come
    last."""
    adapter = make_adapter(id="nic-0", switch="lan", mac="02:00:00:00:00:0a")
    interfaces = (
        GuestInterface("lo", "00:00:00:00:00:00", ("127.0.0.1/8",)),
        GuestInterface("eth0", "02:00:00:00:00:0A", ("fe80::1/64", "10.0.0.5/24")),
    )
    spec = make_spec(name="web", adapters=[adapter])
    one = MachineInfo("web", MachineState.RUNNING, spec, guest=GuestInfo("ok", 0.1, None, interfaces))
    assert addresses_of(one, adapter) == ["10.0.0.5/24", "fe80::1/64"]
    assert addresses_of(MachineInfo("web", MachineState.OFF, spec), adapter) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (7.9, "7 s"),
        (302, "5 min 02 s"),
        (3 * 3600 + 300, "3 h 05 min"),
        (2 * 86400 + 3 * 3600, "2 d 3 h"),
    ],
)
def test_numbers_have_units(seconds: float | None, words: str) -> None:
    """Every number is shown with its unit."""
    assert _duration(seconds) == words
