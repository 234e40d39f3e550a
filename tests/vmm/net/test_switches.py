# SPDX-License-Identifier: Apache-2.0
"""Switches as files: complete or absent, and never deleted under a guest."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support import require_qemu
from vmm.api import doctor
from vmm.cli.switch import list_command
from vmm.host.proc import locked
from vmm.model import errors, paths
from vmm.net import switch_process, switches
from vmm.net.host_side import HostSide
from vmm.net.ports import PortSetup
from vmm.net.switch_spec import SwitchSpec, make_switch


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home and a runtime folder for this test."""
    folder = Path(tempfile.mkdtemp(prefix="vmm-sw-"))
    monkeypatch.setenv("VMM_HOME", str(folder / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(folder / "run"))
    yield folder
    for spec in switches.load_all():
        switches.delete(spec.name, force=True)
    shutil.rmtree(folder)


def test_a_switch_is_made_found_and_deleted(home: Path) -> None:
    """A new switch runs, is found by its name, and leaves nothing behind when it is deleted."""
    spec = make_switch(name="lab")
    switches.create(spec)
    assert switches.load("lab") == spec
    assert switches.names() == ["lab"]
    assert HostSide(spec).user.is_running()
    switches.delete("lab")
    assert switches.names() == []
    assert not HostSide(spec).user.is_running()
    assert not any((home / "run").iterdir())


def test_too_long_socket_names_are_refused_beforehand(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch whose sockets could not be made is not made."""
    monkeypatch.setenv("VMM_RUNTIME", "/tmp/" + "r" * 90)
    with pytest.raises(errors.InvalidSpec, match=r"too long for sockets.*VMM_RUNTIME"):
        switches.create(make_switch(name="lab"))
    assert switches.names() == []


def test_names_and_networks_are_unique(home: Path) -> None:
    """A second switch with the same name, or with an overlapping network, is refused and leaves nothing."""
    switches.create(make_switch(name="lab"))
    with pytest.raises(errors.AlreadyExists, match="'lab'"):
        switches.create(make_switch(name="lab"))
    first = make_switch(name="one", type="internal", address="10.77.250.1/24")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostSide, "ensure", lambda self: None)
        switches.create(first)
        with pytest.raises(errors.InvalidSpec, match="overlaps with switch 'one'"):
            switches.create(make_switch(name="two", type="internal", address="10.77.250.9/25"))
    assert switches.names() == ["lab", "one"]


def test_a_failed_create_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch that the host cannot provide does not exist afterwards."""

    def fails(self: HostSide) -> None:
        self.user.ensure_running()
        Path(paths.switch_leases(spec.id)).touch()
        raise errors.Unsupported("no")

    spec = make_switch(name="lab")
    monkeypatch.setattr(HostSide, "ensure", fails)
    with pytest.raises(errors.Unsupported):
        switches.create(spec)
    assert switches.names() == []
    assert not any((home / "run").iterdir())
    assert [one.name for one in (home / "home" / "switches").iterdir()] == [".lock"]


def test_create_fails_if_the_gateway_does_not_start(home: Path) -> None:
    """If the gateway ends at once, here because a port is taken, the switch is not made, and the error has the
    reason."""
    require_qemu()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        forward = f"tcp:127.0.0.1:{taken.getsockname()[1]}-10.77.250.9:22"
        spec = make_switch(name="nat", type="internal", address="10.77.250.1/24", forwards=(forward,))
        with pytest.raises(errors.VmmError, match=r"gateway of switch 'nat' did not start: .*forwarding"):
            switches.create(spec)
    assert switches.names() == []
    assert not any((home / "run").iterdir())


def test_changes_to_leases_take_effect_at_once(home: Path) -> None:
    """A low range has a gateway; a fixed address that is set later takes effect at once, and the gateway stays the
    same."""
    require_qemu()
    settings = {"dhcp_first": "10.77.250.1", "dhcp_last": "10.77.250.9"}
    switches.create(make_switch(name="nat", type="internal", address="10.77.250.1/24", **settings))
    user = HostSide(switches.load("nat")).user
    before = user.status()
    assert before is not None
    assert before["gateway"]["ready"]
    assert before["dhcp"]["fixed"] == []
    lease = {"mac": "02:00:00:00:00:01", "address": "10.77.250.20"}
    switches.change("nat", lambda spec: make_switch(**{**spec.model_dump(), "leases": [lease]}))
    after = user.status()
    assert after is not None
    assert after["dhcp"]["fixed"] == [["02:00:00:00:00:01", "10.77.250.20", ""]]
    assert after["gateway"]["pid"] == before["gateway"]["pid"]
    wide = make_switch(name="wide", type="internal", address="10.77.251.1/24", dhcp_last="10.77.251.255")
    with pytest.raises(errors.InvalidSpec, match="broadcast"):
        switches.create(wide)


def test_a_switch_that_hangs_can_be_deleted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It requires force, as the error says, and then a few seconds: the process is asked once, and killed."""
    switches.create(make_switch(name="lab"))
    user = HostSide(switches.load("lab")).user
    status = user.status()
    assert status is not None
    os.kill(status["pid"], signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(switch_process, "ANSWER_SECONDS", 0.2)
        listed = CliRunner().invoke(list_command, [], catch_exceptions=False)
        assert (listed.exit_code, "does not answer" in listed.output) == (0, True)
        (examined,) = doctor._check_switches()
        assert (examined.state, examined.found) == (doctor.State.LIMITED, "lab: switch lab did not answer")
        with pytest.raises(errors.TimedOut, match="lab did not answer") as caught:
            switches.delete("lab")
    assert "--force" in str(caught.value.hint)
    start = time.monotonic()
    switches.delete("lab", force=True)
    assert time.monotonic() - start < switch_process.ANSWER_SECONDS, "the process was asked more than once"
    assert switches.names() == []
    assert not user.is_running()


def test_a_partly_undone_switch_can_be_deleted_later(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch that was made in part, and undone in part, keeps its file, so that the rest can be undone later."""
    spec = make_switch(name="lab", backend="bridge")

    def fails(self: HostSide, **given: bool) -> None:
        paths.make_private(self.folder)
        Path(self.folder, "journal.json").write_text('{"boot_id": "x", "complete": false, "done": [{"kind": "up"}]}')
        raise errors.VmmError("no")

    monkeypatch.setattr(HostSide, "ensure", fails)
    with monkeypatch.context() as patch:
        patch.setattr(HostSide, "remove", fails)
        with pytest.raises(errors.VmmError):
            switches.create(spec)
    assert switches.names() == ["lab"]
    Path(HostSide(spec).folder, "journal.json").unlink()
    monkeypatch.setattr(HostSide, "remove", lambda self, **given: [])
    switches.delete("lab")


def test_a_change_applies_to_the_switch_as_it_is_by_then(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fixed addresses set at once are both kept, and a switch made again meanwhile is the one that is deleted.

    INV-READ-UNDER-LOCK.
    """
    removed: list[str] = []
    monkeypatch.setattr(HostSide, "ensure", lambda self: None)
    monkeypatch.setattr(HostSide, "guests", lambda self: [])
    monkeypatch.setattr(HostSide, "remove", lambda self, **given: removed.append(self.spec.id))
    first = make_switch(name="lab", type="internal", backend="bridge", address="10.77.250.1/24")
    switches.create(first)
    leases = [{"mac": f"02:00:00:00:00:0{n}", "address": f"10.77.250.{n}"} for n in (2, 3)]

    def with_lease(lease: dict[str, str]) -> Callable[[SwitchSpec], SwitchSpec]:
        return lambda spec: make_switch(
            **{**spec.model_dump(), "leases": [*(one.model_dump() for one in spec.leases), lease]}
        )

    def others_first(path: str) -> contextlib.AbstractContextManager[None]:
        monkeypatch.setattr(switches, "locked", locked)
        switches.change("lab", with_lease(leases[0]))
        return locked(path)

    monkeypatch.setattr(switches, "locked", others_first)
    switches.change("lab", with_lease(leases[1]))
    assert [one.address for one in switches.load("lab").leases] == [one["address"] for one in leases]

    def made_anew(path: str) -> contextlib.AbstractContextManager[None]:
        monkeypatch.setattr(switches, "locked", locked)
        switches.delete("lab")
        switches.create(make_switch(name="lab", type="internal", backend="bridge", address="10.77.250.1/24"))
        removed.clear()
        return locked(path)

    monkeypatch.setattr(switches, "locked", made_anew)
    switches.delete("lab")
    assert len(removed) == 1 and removed[0] != first.id


def test_guests_keep_their_switch(home: Path) -> None:
    """A switch with a guest plugged in is deleted only with force."""
    spec = make_switch(name="lab")
    switches.create(spec)
    guest = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    guest.bind(str(home / "g"))
    setup = PortSetup("vm.nic-0", str(home / "s"), str(home / "g"))
    HostSide(spec).user.plug(setup)
    with pytest.raises(errors.InUse, match=r"vm\.nic-0"):
        switches.delete("lab")
    guest.close()
    (home / "g").unlink()
    HostSide(spec).user.plug(replace(setup, rate_bits_per_second=1_000_000))
    switches.delete("lab")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"rubbish", "is not the definition of a switch"),
        (b'{"name": "lab"', "is not the definition of a switch"),
        (b'{"name": "lab", "x": 1}', "x:"),
        (b"", "is not JSON"),
    ],
)
def test_damaged_files_are_reported(home: Path, content: bytes, words: str) -> None:
    """The error names the file and what is wrong; the other switches are still listed."""
    switches.create(make_switch(name="good"))
    path = home / "home" / "switches" / "lab.json"
    path.write_bytes(content)
    with pytest.raises(errors.InvalidSpec, match=words) as caught:
        switches.load("lab")
    assert caught.value.path == str(path)
    assert [spec.name for spec in switches.load_all()] == ["good"]
    path.unlink()


@pytest.mark.parametrize("name", ["unknown", "../x", ".hidden"])
def test_unknown_switches(home: Path, name: str) -> None:
    """The error lists the switches that exist; a name never leads to another folder."""
    with pytest.raises(errors.NotFound, match="does not exist"):
        switches.load(name)


def test_bridges_need_root(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so at once, and what to do instead."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(errors.AccessDenied, match="--backend user"):
        HostSide(make_switch(name="x", backend="bridge")).backend.plan()
