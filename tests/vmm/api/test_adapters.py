# SPDX-License-Identifier: Apache-2.0
"""Adapters in definitions: unique addresses from the host's pool, also with concurrent requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vmm.api import adapters
from vmm.api.manager import Manager
from vmm.model import errors
from vmm.model.spec import make_spec
from vmm.store import registry


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for this test."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))
    return tmp_path / "home"


def test_the_pool_stays_when_the_hosts_address_changes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is recorded when it is first used."""
    monkeypatch.setattr(adapters, "_first_address", lambda: "192.168.3.4")
    first = adapters.host_pool()
    assert str(first) == "00-15-5D-03-04-00 to -FF"
    monkeypatch.setattr(adapters, "_first_address", lambda: None)
    assert adapters.host_pool() == first
    (home / "mac-pool.json").write_text("{}")
    with pytest.raises(errors.VmmError, match="damaged"):
        adapters.host_pool()


@pytest.mark.parametrize("word", ["nic-0", "00:15:5d:00:00:0a", "00-15-5D-00-00-0A", "00155d00000a"])
def test_an_adapter_is_found_by_its_mac_address(home: Path, word: str) -> None:
    """In any of the accepted spellings of an address."""
    registry.add(make_spec(name="web"))
    Manager().add_adapter("web", switch=None, mac="00:15:5d:00:00:0a")
    assert adapters.find(registry.load("web"), word).id == "nic-0"


def test_concurrent_requests_get_different_addresses(home: Path) -> None:
    """Machines that get adapters at the same time never share an address."""
    names = [f"m{number}" for number in range(4)]
    for name in names:
        registry.add(make_spec(name=name))
    program = "import sys, vmm; [vmm.Manager().add_adapter(sys.argv[1]) for _ in range(5)]"
    processes = [subprocess.Popen([sys.executable, "-c", program, name]) for name in names]
    assert [process.wait(60) for process in processes] == [0] * 4
    macs = [one.mac for name in names for one in registry.load(name).spec.adapters]
    assert len(set(macs)) == len(macs) == 20


def test_adapters_are_found_changed_and_removed(home: Path) -> None:
    """By id or address; an address of another adapter is refused, the adapter's own is accepted."""
    for name in ("one", "two"):
        registry.add(make_spec(name=name))
    first, second = Manager().add_adapter("one"), Manager().add_adapter("two", mac="02:00:00:00:00:01")
    assert first.mac is not None
    assert Manager().change_adapter("one", first.mac, mac=first.mac.upper(), spoofing=True).spoofing
    with pytest.raises(errors.AlreadyExists, match="adapter nic-0 of machine one"):
        Manager().change_adapter("two", second.id, mac=first.mac)
    with pytest.raises(errors.NotFound, match="its adapters: nic-0"):
        Manager().remove_adapter("one", "nic-5")
    Manager().remove_adapter("one", "nic-0")
    assert registry.load("one").spec.adapters == ()
    spec = registry.load("two").spec
    assert registry.machine_of_port(f"{spec.id.replace('-', '')[:12]}.nic-0") == ("two", "nic-0")
    assert registry.machine_of_port("gateway") == ("gateway", "")
