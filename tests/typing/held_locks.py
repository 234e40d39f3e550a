# SPDX-License-Identifier: Apache-2.0
"""What the type checker must refuse: a change decided by what was read before the lock was held. INV-READ-UNDER-LOCK.

This program is never run. If mypy stops refusing a line, it complains about the comment that expects the error.
"""

from __future__ import annotations

from vmm.snapshots.apply import apply
from vmm.snapshots.create import SnapshotRequest, create
from vmm.snapshots.delete import delete
from vmm.snapshots.recovery import settle
from vmm.snapshots.steps import tidy
from vmm.store import registry


def decide_too_early() -> None:
    """A machine opened without its lock must not be accepted where one is changed."""
    machine = registry.load("web")
    registry.save(machine, machine.spec)  # type: ignore[arg-type]
    registry.rename(machine, machine.spec)  # type: ignore[arg-type]
    registry.remove(machine)  # type: ignore[arg-type]
    create(machine, SnapshotRequest())  # type: ignore[arg-type]
    apply(machine, "one")  # type: ignore[arg-type]
    delete(machine, "one")  # type: ignore[arg-type]
    registry.load_for_change(machine)  # type: ignore[arg-type]
    settle(machine)  # type: ignore[arg-type]
    with registry.changing("web") as held:
        registry.save(held, held.spec)
        tidy(held.lock)  # type: ignore[arg-type]
