# SPDX-License-Identifier: Apache-2.0
"""What this kernel's bridges can do, found out without creating one.

Decides which of a bridge's files, or else which option of the kernel's configuration, answers that. Must not know
which switch needs it.
"""

from __future__ import annotations

import gzip
import os


def has_vlan_filtering() -> bool:
    """True if this kernel's bridges support VLANs, according to one of its bridges or the kernel's configuration."""
    for name in os.listdir("/sys/class/net"):
        if os.path.isdir(f"/sys/class/net/{name}/bridge"):
            return os.path.exists(f"/sys/class/net/{name}/bridge/vlan_filtering")
    return _configured("CONFIG_BRIDGE_VLAN_FILTERING")


def _configured(option: str) -> bool:
    wanted = f"{option}=y".encode()
    for path in ("/proc/config.gz", f"/boot/config-{os.uname().release}"):
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                return wanted in file.read().splitlines()
        except OSError:
            continue
    return False
