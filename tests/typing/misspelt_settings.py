# SPDX-License-Identifier: Apache-2.0
"""What the type checker must refuse: settings of a machine that are misspelt, or have the wrong type.

This program is never run. If mypy stops refusing a line, it complains about the comment that expects the error.
"""

from __future__ import annotations

import vmm


def misspell(manager: vmm.Manager) -> None:
    """Every setting is accepted by its name, and none by another."""
    manager.set("web", memory_bytes=1 << 30, name="www", automatic=vmm.AutomaticSpec(stop="shut-down"))
    manager.set("web", memory=1 << 30)  # type: ignore[call-arg]
    manager.set("web", memory_bytes="1G")  # type: ignore[arg-type]
    manager.set("web", firmware="efi")  # type: ignore[arg-type]
    manager.set("web", disks=[])  # type: ignore[call-arg]
    manager.create("web", boot_order=["disk"], kernel=None, paths={"disks": "/srv/disks"})
    manager.create("web", cpus=2)  # type: ignore[call-arg]
    manager.create("web", cpu_count=2.5)  # type: ignore[arg-type]
