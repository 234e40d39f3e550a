# SPDX-License-Identifier: Apache-2.0
"""UEFI variables belong to a machine's state, also when there are none yet."""

from __future__ import annotations

import os
from pathlib import Path

import vmm
from tests.vmm.snapshots.machines import Machines
from vmm.store import registry


def test_variables_come_and_go_with_snapshots(machines: Machines) -> None:
    """Applying a snapshot brings its variables back; one of before the first start takes later ones away.

    A machine that boots by BIOS has none, and what lies there is left alone.
    """
    web = machines.create(firmware="uefi")
    variables = Path(registry.load("web").paths.uefi_variables)
    web.create("never started")
    variables.write_bytes(b"one")
    web.create("started")
    variables.write_bytes(b"two")
    web.apply("started", discard_current=True)
    assert variables.read_bytes() == b"one"
    web.apply("never started", discard_current=True)
    assert not os.path.exists(variables)
    web.apply("started", discard_current=True)
    assert variables.read_bytes() == b"one"

    vmm.Manager().set("web", firmware="bios")
    web.create("by BIOS")
    web.apply("by BIOS", discard_current=True)
    assert variables.read_bytes() == b"one"
