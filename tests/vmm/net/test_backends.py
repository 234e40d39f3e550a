# SPDX-License-Identifier: Apache-2.0
"""The two back ends of a switch: which one is chosen, and that each implements the whole interface."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from vmm.model import errors
from vmm.net import adapter, switch_spec
from vmm.net.backends import AdapterPort, Backend, HostChanges, UserBackend
from vmm.net.bridge_backend import BridgeBackend
from vmm.net.host_side import HostSide
from vmm.net.ports import PortSetup
from vmm.net.switch_spec import BackendName, make_switch


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runtime folder."""
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path))
    return tmp_path


def back_end(name: BackendName) -> Backend:
    """The back end of a private switch of which nothing has been made."""
    return HostSide(make_switch(name="lab", backend=name)).backend


def port(runtime: Path) -> AdapterPort:
    """A port of which nothing has been made."""
    return AdapterPort("vt-absent", str(runtime / "nic-0"), PortSetup("0.nic-0", "/switch", "/guest"))


def test_every_back_end_is_known_everywhere() -> None:
    """A new back end must have capabilities and a way to plug in an adapter."""
    names = set(get_args(BackendName))
    assert set(switch_spec.CAPABILITIES) == set(adapter._PLUGS) == set(adapter._DATA_PATHS) == names


def test_the_settings_choose(runtime: Path) -> None:
    """With the user back end a switch is a process, with the bridge back end a bridge."""
    assert isinstance(back_end("user"), UserBackend) and isinstance(back_end("bridge"), BridgeBackend)


@pytest.mark.parametrize("name", get_args(BackendName))
def test_looking_at_a_switch_that_was_not_made(runtime: Path, name: BackendName) -> None:
    """Looking at a switch that is not on the host reports its absence, changes nothing and needs no root."""
    backend = back_end(name)
    assert not backend.is_up() and backend.end_descriptor() is None and backend.status() is None
    assert backend.port_status() == [] and not backend.fits(port(runtime))
    assert "not" in backend.state(None)
    backend.unplug(port(runtime))  # there is nothing to remove
    assert list(runtime.iterdir()) == []


def test_the_user_back_end_changes_nothing_of_the_host(runtime: Path) -> None:
    """Its plan is empty, no foreign rules block it, its process captures frames, and its ports stay."""
    backend = back_end("user")
    assert backend.plan() == HostChanges() and backend.in_the_way() == []
    backend.refuse_capture("x.pcapng")
    assert backend.is_in(port(runtime))
    assert backend.mtu_bytes() is None


def test_the_bridge_back_end_names_the_kernels_commands(runtime: Path) -> None:
    """Requests that the kernel's own tools serve are refused with the command to use; a tap outside the bridge is
    reported as such."""
    backend = back_end("bridge")
    with pytest.raises(errors.Unsupported, match="bridge fdb show br vmm"):
        backend.addresses()
    with pytest.raises(errors.Unsupported, match=r"tcpdump -i vmm\w+ -w x\.pcapng"):
        backend.refuse_capture("x.pcapng")
    assert not backend.is_in(port(runtime))
    assert backend.mtu_bytes() == switch_spec.USUAL_MTU_BYTES
