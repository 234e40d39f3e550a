# SPDX-License-Identifier: Apache-2.0
"""Rules of a bridge that were removed, for example by `nft flush ruleset`: detected and loaded again.

Decides what a check costs while nothing happens: one request to the kernel, for the number of the state of all rules
(`rule_check.generation`), which is compared with the one at which the switch's rules were last found as planned. The
process that finds another number compares the rules, under the switch's lock, which is released if it dies; the others
see that it is done. Which processes check, and when: `watching`.

    FOLDER/rules.json   {"boot_id": ..., "generation": 17, "attempts": 0}

If the kernel never shows the rules as they were loaded, as with another version of nft, they are loaded a few times
and after that only when a rule has changed.

`INV-RULES-BACK`: while a machine that is on a bridge runs, the switch's rules are as planned again within a second,
however they were changed, and one of the machines that check has an event for it.
"""

from __future__ import annotations

import contextlib
import json
import os

from vmm.model import errors, paths
from vmm.net import enforcing, records, rule_check, settings
from vmm.net.host_side import HostSide

MAX_ATTEMPTS = 3
_NAME = "rules.json"


def differences(host: HostSide) -> list[str]:
    """The differences between a bridge's rules and the plan; only root can see them. Raises VmmError."""
    if not host.spec.capabilities.in_kernel or os.geteuid() != 0 or not _is_there(host):
        return []
    with host.bridge.changing():
        return rule_check.differences(host.spec, host.bridge.bridge_ports())


def is_verified(host: HostSide) -> bool:
    """True if the rules are known to be as planned, or if this cannot be determined."""
    try:
        return not _is_there(host) or rule_check.generation() == _verified(host)
    except errors.VmmError:
        return True


def restore(host: HostSide) -> list[str]:
    """Make the rules as planned; returns the differences, in words. The caller holds the switch's lock. Raises
    VmmError.
    """
    if not _is_there(host):
        return []
    generation, ports = rule_check.generation(), host.bridge.bridge_ports()
    if generation == _verified(host):
        return []
    found = rule_check.differences(host.spec, ports)
    if not found:
        _note(host, generation, 0)
        return []
    enforcing.enforce(host.spec, ports, anew=True)  # this is a new state, which must be checked again
    attempts = _noted(host).get("attempts", 0) + 1
    _note(host, rule_check.generation() if attempts >= MAX_ATTEMPTS else None, attempts)
    return found


def _is_there(host: HostSide) -> bool:
    return os.path.isdir(f"/sys/class/net/{host.spec.bridge_name}")


def _note(host: HostSide, generation: int | None, attempts: int) -> None:
    document = {"boot_id": settings.boot_id(), "generation": generation, "attempts": attempts}
    paths.write_whole(os.path.join(host.folder, _NAME), json.dumps(document).encode(), durable=False)


def _noted(host: HostSide) -> dict[str, int]:
    """The note from this boot; empty if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, ArithmeticError):
        document = records.read_object(os.path.join(host.folder, _NAME))
        if document["boot_id"] == settings.boot_id():
            return {key: int(document[key]) for key in ("generation", "attempts") if document[key] is not None}
    return {}


def _verified(host: HostSide) -> int | None:
    """The state in which the rules were found as planned, or given up."""
    return _noted(host).get("generation")
