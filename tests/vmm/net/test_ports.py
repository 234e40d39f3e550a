# SPDX-License-Identifier: Apache-2.0
"""How a port is recorded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.net.test_engine import rules
from vmm.model import errors
from vmm.net import ports
from vmm.net.engine import PortRules
from vmm.net.ports import PortSetup


@given(rules(), st.integers(0, 10**9), st.none() | st.integers(0, 65535), st.booleans())
def test_ports_round_trip(one: PortRules, rate: int, owner: int | None, up: bool) -> None:
    """A written port reads back the same, whatever its rules."""
    setup = PortSetup("p", "/a", "/b", one, rate, owner, up)
    assert ports.from_document(ports.to_document(setup)) == setup


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"address": "/" + "x" * 107}, "address"),
        ({"peer": None}, "peer"),
        ({"colour": 1}, "no setting 'colour'"),
        ({"macs": ["nonsense"]}, "not a MAC address"),
        ({"macs": ["02:00:00:00:00:01"] * 65}, "at most 64"),
        ({"macs": "02:00:00:00:00:01"}, "list"),
        ({"vlan": 4095}, "0 to 4094"),
        ({"vlan": True}, "vlan"),
        ({"allowed": [0]}, "from 1 to 4094"),
        ({"allowed": ["1"]}, "list"),
        ({"mode": "bridge"}, "bridge"),
        ({"spoofing": 1}, "true or false"),
        ({"rate_bits_per_second": -1}, "rate"),
    ],
)
def test_wrong_ports_are_refused(change: dict[str, Any], words: str) -> None:
    """The error names the setting that is wrong."""
    document = {**ports.to_document(PortSetup("p", "/a", "/b")), **change}
    with pytest.raises(errors.InvalidSpec, match=words):
        ports.from_document(document)
