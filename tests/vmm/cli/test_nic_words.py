# SPDX-License-Identifier: Apache-2.0
"""How adapters are specified on the command line."""

from __future__ import annotations

import click
import pytest

from vmm.cli.nic_words import parse_nic, parse_rate, parse_vlans


def test_a_switch_alone() -> None:
    """An argument without options is a switch; a dash means none."""
    assert parse_nic("lan") == {"switch": "lan"}
    assert parse_nic("-") == {"switch": None}


def test_every_option() -> None:
    """Each option becomes a setting."""
    word = (
        "lan,type=legacy,mac=00-15-5D-00-00-01,trunk=10+20-22,native=10,queues=2,spoofing=on,dhcp-guard=on,"
        "router-guard=off,bandwidth=1.5M,storm=100,mirror=source,link=down"
    )
    assert parse_nic(word) == {
        "switch": "lan",
        "kind": "legacy",
        "mac": "00:15:5d:00:00:01",
        "trunk": [10, 20, 21, 22],
        "native_vlan": 10,
        "queues": 2,
        "spoofing": True,
        "dhcp_guard": True,
        "router_guard": False,
        "bandwidth_bits_per_second": 1_500_000,
        "storm_frames_per_second": 100,
        "mirror": "source",
        "link_up": False,
    }


@pytest.mark.parametrize(
    "word",
    [
        "", ",vlan=1", "vlan=1", "lan,vlan", "lan,vlan=", "lan,vlan=x", "lan,colour=red", "lan,spoofing=yes",
        "lan,link=on", "lan,bandwidth=fast", "lan,trunk=1-", "lan,trunk=5-3", "lan,trunk=0", "lan,trunk=4095", "lan,",
    ],
)  # fmt: skip
def test_malformed_adapters(word: str) -> None:
    """Each is a usage error."""
    with pytest.raises(click.BadParameter):
        parse_nic(word)


@pytest.mark.parametrize(
    ("text", "bits"), [("100M", 10**8), ("8000000", 8 * 10**6), ("1 Gbit/s", 10**9), ("64k", 64000)]
)
def test_units_of_rates(text: str, bits: int) -> None:
    """Rates are in bits per second, with decimal factors as usual in networks."""
    assert parse_rate(text) == bits


def test_vlan_lists_have_no_duplicates() -> None:
    """Ranges may overlap."""
    assert parse_vlans("10-12+11+4") == [4, 10, 11, 12]
