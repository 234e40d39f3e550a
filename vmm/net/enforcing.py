# SPDX-License-Identifier: Apache-2.0
"""Everything that the kernel enforces for a bridge's ports: nftables' rules and the queues of bandwidth limits.

Decides the order: a queue exists before frames are led to it, and is removed after the last rule that leads there.
Idempotent; repeating it resets neither counters nor what is left of a limit (`INV-LIMITS-KEPT`). For one caller at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmm.model import errors
from vmm.net import nft, shaping
from vmm.net.engine import Drop
from vmm.net.nft import GuestPort
from vmm.net.switch_spec import SwitchSpec


def enforce(spec: SwitchSpec, ports: Sequence[GuestPort], *, anew: bool = False) -> None:
    """Enforce the rules and limits of these ports, whose taps exist, and of no others; `anew` as in `nft.load`.

    Raises Unsupported, VmmError.
    """
    limited = {port.interface: port.rate_bits_per_second for port in ports if port.is_shaped}
    there = shaping.ensure(spec, limited) if limited else frozenset()
    try:
        nft.load(spec, [port for port in ports if not port.is_shaped or port.interface in there], anew=anew)
    except errors.VmmError:  # the kernel rejects rules for a tap that has just disappeared
        if not limited or shaping.ensure(spec, limited) == there:
            raise
        enforce(spec, ports, anew=anew)
        return
    shaping.drop_others(spec, limited)


def end(spec: SwitchSpec) -> None:
    """Remove everything that is enforced for the switch; succeeds if there is nothing. Raises VmmError."""
    nft.run(nft.removal(spec))
    shaping.drop_others(spec, {})


def drops(spec: SwitchSpec) -> dict[str, dict[str, int]]:
    """Frames dropped so far: interface -> reason -> how many. Raises Unsupported, VmmError."""
    found = nft.drops(spec)
    for interface, count in shaping.drops(spec).items():
        found.setdefault(interface, {})[Drop.BANDWIDTH] = count
    return found
