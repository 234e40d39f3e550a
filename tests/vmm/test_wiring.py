# SPDX-License-Identifier: Apache-2.0
"""Adapters on QEMU's bus and in the order of booting."""

from __future__ import annotations

from vmm import wiring
from vmm.net.adapter import Plugged
from vmm.spec import make_adapter, make_spec


def test_places_on_the_bus_follow_from_ids() -> None:
    """An adapter keeps its place when others come and go; one with a name of its own has its number's."""
    spec = make_spec(name="x", adapters=[make_adapter(id=name) for name in ("nic-0", "nic-7", "mine")])
    slots = [wiring.slot_of(adapter, spec) for adapter in spec.adapters]
    assert slots == [20, 27, 22]
    fewer = spec.changed(adapters=spec.adapters[1:])
    assert wiring.slot_of(fewer.adapters[0], fewer) == 27


def test_only_legacy_adapters_are_booted_from() -> None:
    """They get their number in the order of booting; a synthetic one cannot boot."""
    spec = make_spec(
        name="x", boot_order=["network"], adapters=[make_adapter(id="nic-0"), make_adapter(id="nic-1", kind="legacy")]
    )
    plugged = Plugged({"id": "w"}, {"driver": "d"}, "")
    devices = [wiring.described(adapter, spec, plugged).device for adapter in spec.adapters]
    assert "bootindex" not in devices[0]
    assert devices[1] == {"driver": "d", "bus": "pci.0", "addr": "0x15", "bootindex": 2}
