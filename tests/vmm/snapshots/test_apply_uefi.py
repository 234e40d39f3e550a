# SPDX-License-Identifier: Apache-2.0
"""UEFI variables belong to a machine's state, even when it has none yet."""

from __future__ import annotations

import os
from pathlib import Path

import vmm
from tests.vmm.snapshots.machines import Machines
from vmm.store import registry


def test_snapshots_include_uefi_variables(machines: Machines) -> None:
    """Applying a snapshot restores its variables; one taken before the first start removes later ones.

    A machine that boots by BIOS has none, and a file in their place is left alone.
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
