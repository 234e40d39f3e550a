# SPDX-License-Identifier: Apache-2.0
"""dnsmasq's configuration, and its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import require_tool
from vmm.net import dhcp
from vmm.net.switch_spec import make_switch

PLAIN = make_switch(
    id="01234567-89ab-cdef-0123-456789abcdef",
    name="x",
    type="internal",
    backend="bridge",
    address="10.77.0.1/24",
    leases=[{"mac": "00:15:5d:00:00:01", "address": "10.77.0.10", "name": "web"}],
)


def test_configuration() -> None:
    """Bound only to the bridge; the range, the fixed lease with its name; without NAT no router and no resolver."""
    lines = dhcp.configuration(PLAIN, "/leases").splitlines()
    assert {
        "bind-interfaces",
        "interface=vmm01234567",
        "listen-address=10.77.0.1",
        "dhcp-range=10.77.0.128,10.77.0.254,255.255.255.0,3600",
        "dhcp-host=00:15:5d:00:00:01,10.77.0.10,web",
        "dhcp-option=option:router",
        "no-resolv",
        "dhcp-leasefile=/leases",
    } <= set(lines)
    nat = make_switch(**{**PLAIN.model_dump(), "nat": True})
    assert "dhcp-option=option:router,10.77.0.1" in dhcp.configuration(nat, "/leases").splitlines()
    assert "no-resolv" not in dhcp.configuration(nat, "/leases").splitlines()


def test_dnsmasq_accepts_the_configuration(tmp_path: Path) -> None:
    """dnsmasq finds no fault in it."""
    path = tmp_path / "dnsmasq.conf"
    path.write_text(dhcp.configuration(PLAIN, str(tmp_path / "leases")))
    subprocess.run([require_tool("dnsmasq"), "--test", f"--conf-file={path}"], check=True, capture_output=True)


def test_leases_are_read(tmp_path: Path) -> None:
    """The addresses of clients are read from dnsmasq's file."""
    path = tmp_path / "leases"
    path.write_text("1700000000 00:15:5d:00:00:01 10.77.0.10 web *\n")
    (one,) = dhcp.Dnsmasq(PLAIN, str(tmp_path), str(path)).leases()
    assert (one["address"], one["name"]) == ("10.77.0.10", "web")
    assert dhcp.Dnsmasq(PLAIN, str(tmp_path), str(tmp_path / "none")).leases() == []


def test_stopping_without_a_server_is_not_an_error(tmp_path: Path) -> None:
    """Stopping a server that does not run succeeds, even with a damaged note."""
    server = dhcp.Dnsmasq(PLAIN, str(tmp_path), str(tmp_path / "leases"))
    server.stop()
    (tmp_path / "dnsmasq.json").write_text("rubbish")
    assert server.process() is None
    server.stop()


def test_a_server_without_a_note_is_stopped(tmp_path: Path) -> None:
    """A server whose starter was killed before it wrote the note is found by its configuration; no other server is
    stopped."""

    def program(folder: str) -> subprocess.Popen[bytes]:
        words = ["-c", "import time; time.sleep(60)", f"--conf-file={folder}/dnsmasq.conf"]
        return subprocess.Popen([sys.executable, *words])

    ours, other = program(str(tmp_path)), program(f"{tmp_path}2")
    try:
        dhcp.Dnsmasq(PLAIN, str(tmp_path), str(tmp_path / "leases")).stop()
        ours.wait(10)
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


@pytest.mark.parametrize("note", ['{"pid": 1, "start_ticks": 1}', '{"pid": 999999999, "start_ticks": 5}', "[]"])
def test_numbers_of_other_processes_are_not_believed(tmp_path: Path, note: str) -> None:
    """A note with the number of a foreign process never leads to a signal."""
    (tmp_path / "dnsmasq.json").write_text(note)
    assert dhcp.Dnsmasq(PLAIN, str(tmp_path), str(tmp_path / "leases")).process() is None
