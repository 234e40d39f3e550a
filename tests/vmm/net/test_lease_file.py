# SPDX-License-Identifier: Apache-2.0
"""The file of leases."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tests.vmm.net import packets
from tests.vmm.net.dhcp_client import DISCOVER, REQUEST
from tests.vmm.net.test_dhcp_server import ONE, SETUP, TWO, ask, selected
from vmm.net import lease_file
from vmm.net.dhcp_server import DhcpServer


def test_saved_leases_are_read_back(tmp_path: Path) -> None:
    """Leases are read back with their names, in dnsmasq's form; mere offers are not saved."""
    path = str(tmp_path / "leases")
    server = DhcpServer(SETUP)
    mine = selected(server, ONE, 1000.5)
    ask(server, ONE, REQUEST, 1000.5, options={50: socket.inet_aton(mine), 12: b"web"})
    other = selected(server, TWO, 1000.5)
    ask(server, packets.mac(3), DISCOVER, 1000.5)
    lease_file.write(path, server)
    assert lease_file.read(path) == [
        {"mac": "02:00:00:00:00:01", "address": mine, "name": "web", "expires": 4601},
        {"mac": "02:00:00:00:00:02", "address": other, "name": None, "expires": 4601},
    ]
    again = DhcpServer(SETUP, lease_file.records(path, 1001, 3600))
    assert [(mac, one.name) for mac, one in again.leases()] == [(ONE, "web"), (TWO, "")]
    assert selected(again, TWO, 1001) == other


def test_lines_that_are_not_leases_are_skipped(tmp_path: Path) -> None:
    """Garbage, links and a pipe are skipped; a lease that would end too late ends as if it were granted now."""
    path = tmp_path / "leases"
    assert lease_file.read(str(path)) == []
    path.write_bytes(
        b"duid x\n1 2 3 4\n\xff\xfe\n1700000000 00:15:5d:00:00:01 10.0.7.300 web *\n"
        b"99999999999999999999 00:15:5d:00:00:01 10.0.7.200 web *\n1700000000 00:15:5d:00:00:02 10.0.7.201 * *\n"
    )
    assert [one["address"] for one in lease_file.read(str(path))] == ["10.0.7.201"]
    ((_, record),) = lease_file.records(str(path), 1000, 3600)
    assert record.expires == 4600
    link = tmp_path / "link"
    link.symlink_to(path)
    assert lease_file.read(str(link)) == []
    os.mkfifo(tmp_path / "pipe")
    assert lease_file.read(str(tmp_path / "pipe")) == []
