# SPDX-License-Identifier: Apache-2.0
"""What the kernel enforces of a bridge's ports, as one: nftables' rules and the queues of bandwidth limits.

Decides the order: a queue is there before frames are led to it, and goes when none are any more. Doing it twice is
fine, and changes nothing: neither counters, nor what a limit has left (`INV-LIMITS-KEPT`). For one caller at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmm.model import errors
from vmm.net import nft, shaping
from vmm.net.engine import Drop
from vmm.net.nft import GuestPort
from vmm.net.switch_spec import SwitchSpec


def enforce(spec: SwitchSpec, ports: Sequence[GuestPort], *, anew: bool = False) -> None:
    """Have the rules and limits of these ports, whose taps are there, and no others; `anew` as of `nft.load`.

    Raises Unsupported, VmmError.
    """
    limited = {port.interface: port.rate_bits_per_second for port in ports if port.is_shaped}
    there = shaping.ensure(spec, limited) if limited else frozenset()
    try:
        nft.load(spec, [port for port in ports if not port.is_shaped or port.interface in there], anew=anew)
    except errors.VmmError:  # the kernel takes no rules for a tap that went just now
        if not limited or shaping.ensure(spec, limited) == there:
            raise
        enforce(spec, ports, anew=anew)
        return
    shaping.drop_others(spec, limited)


def end(spec: SwitchSpec) -> None:
    """Have nothing of the switch's; fine when there is nothing. Raises VmmError."""
    nft.run(nft.removal(spec))
    shaping.drop_others(spec, {})


def drops(spec: SwitchSpec) -> dict[str, dict[str, int]]:
    """Frames dropped so far: interface -> reason -> how many. Raises Unsupported, VmmError."""
    found = nft.drops(spec)
    for interface, count in shaping.drops(spec).items():
        found.setdefault(interface, {})[Drop.BANDWIDTH] = count
    return found
