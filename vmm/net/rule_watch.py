# SPDX-License-Identifier: Apache-2.0
"""Rules of a bridge that were taken away, as by `nft flush ruleset`: noticed and loaded again.

Decides what a look costs while nothing happens: one question to the kernel, for the number of the state of all rules
(`rule_check.generation`), which is compared with the one for which the switch's were last found as planned. The
process that finds another compares them, under the switch's lock, which ends with its holder; the others see that it
is done. Which processes look, and when: `watching`.

    FOLDER/rules.json   {"boot_id": ..., "generation": 17, "attempts": 0}

Should the kernel never show the rules as they were loaded, as with an nft of another make, they are loaded a few times
and then only when a rule changed.

`INV-RULES-BACK`: while a machine that is on a bridge runs, the switch's rules are as planned again within a second,
however they were changed, and one of the machines that look has an event for it.
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
    """What of a bridge's rules differs from the plan; only root can see it. Raises VmmError."""
    if not host.spec.capabilities.in_kernel or os.geteuid() != 0 or not _is_there(host):
        return []
    with host.bridge.changing():
        return rule_check.differences(host.spec, host.bridge.bridge_ports())


def is_verified(host: HostSide) -> bool:
    """True when the rules are known to be as planned, or when nothing can be said."""
    try:
        return not _is_there(host) or rule_check.generation() == _verified(host)
    except errors.VmmError:
        return True


def restore(host: HostSide) -> list[str]:
    """Have the rules as planned; in words what was not. The caller holds the switch's lock. Raises VmmError."""
    if not _is_there(host):
        return []
    generation, ports = rule_check.generation(), host.bridge.bridge_ports()
    if generation == _verified(host):
        return []
    found = rule_check.differences(host.spec, ports)
    if not found:
        _note(host, generation, 0)
        return []
    enforcing.enforce(host.spec, ports, anew=True)  # which is another state, to be looked at again
    attempts = _noted(host).get("attempts", 0) + 1
    _note(host, rule_check.generation() if attempts >= MAX_ATTEMPTS else None, attempts)
    return found


def _is_there(host: HostSide) -> bool:
    return os.path.isdir(f"/sys/class/net/{host.spec.bridge_name}")


def _note(host: HostSide, generation: int | None, attempts: int) -> None:
    document = {"boot_id": settings.boot_id(), "generation": generation, "attempts": attempts}
    paths.write_whole(os.path.join(host.folder, _NAME), json.dumps(document).encode(), durable=False)


def _noted(host: HostSide) -> dict[str, int]:
    """What was noted since the host started; nothing where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, ArithmeticError):
        document = records.read_object(os.path.join(host.folder, _NAME))
        if document["boot_id"] == settings.boot_id():
            return {key: int(document[key]) for key in ("generation", "attempts") if document[key] is not None}
    return {}


def _verified(host: HostSide) -> int | None:
    """The state in which the rules were found as planned, or given up."""
    return _noted(host).get("generation")
