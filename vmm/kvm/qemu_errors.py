# SPDX-License-Identifier: Apache-2.0
"""Error messages of QEMU and its libraries, translated for users.

Decides which of their messages are known, and what to do about each. An unknown one stays in the log in which it was
found, and the report names that log. Pure.

Sources: messages of QEMU 7.2 to 10 (`block/iscsi.c`, `softmmu`, `target/i386/cpu.c`), libiscsi's `login.c` and
`socket.c`, as observed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

LOG = logging.getLogger("vmm.qemu")  # the original messages; a worker writes them to its log
_KNOWN: tuple[tuple[str, str, str | None], ...] = (
    (
        r"LOGICAL_UNIT_NOT_SUPPORTED",
        "the target has no such LUN",
        None,
    ),
    (
        r"Target not found",
        "the target does not exist, or does not admit this machine",
        "its access rules must name the machine's initiator, iqn.2008-11.org.linux-kvm:ID (vmm show says the id)",
    ),
    (
        r"Authentication failure",
        "the target does not let this machine log in: the user or the password is wrong",
        None,
    ),
    (
        r"Authorization failure|Failed to log in to target",
        "the target does not let this machine log in",
        "its access rules must name the machine's initiator, iqn.2008-11.org.linux-kvm:ID (vmm show says the id)",
    ),
    (
        r"Can not resolv",
        "the target's host name cannot be resolved",
        None,
    ),
    (
        r"iSCSI: Failed to connect|iscsi_service",
        "the target cannot be reached: it does not answer",
        None,
    ),
    (
        r"Unknown driver 'iscsi'|does not accept value 'iscsi'|(?i:parameter) 'driver'.*iscsi",
        "this QEMU cannot reach iSCSI targets",
        "sudo apt install qemu-block-extra",
    ),
    (
        r"cannot set up guest memory|[Cc]annot allocate memory",
        "this host has not enough free memory for the machine",
        "give it less (vmm set NAME --memory), or stop another one",
    ),
    (
        r"unable to find CPU model '([^']*)'",
        "QEMU has no processor model {0!r}",
        "qemu-system-x86_64 -cpu help lists them; vmm set NAME --cpu MODEL",
    ),
    (
        r"Property '[^']*-cpu\.([^']*)' not found|CPU .*(?i:property) '?\.?([\w-]+)'? not found",
        "the processor model has no such feature: {0}",
        "vmm set NAME --cpu MODEL",
    ),
    (
        r"unsupported machine type|list supported machines",
        "QEMU does not have the machine's type; the machine was created with another version of QEMU",
        "qemu-system-x86_64 -machine help lists them",
    ),
    (
        r'Failed to get (?:shared )?"[\w-]+" lock|Is another process using the image',
        "another program uses it",
        None,
    ),
    (
        r"(?:Could not access KVM kernel module|failed to initialize kvm): (.*)",
        "KVM cannot be used: {0}",
        "vmm host doctor says what is missing; --accel tcg works without KVM",
    ),
    (
        r"does not support hotplugging",
        "devices cannot be added or removed there while the machine runs",
        "use SCSI, or switch the machine off first",
    ),
    (
        r"Bus '([^']*)' (?:not found|is full)|no slot/function available",
        "no free place is left for another device",
        None,
    ),
    (
        r"No space left on device",
        "no space is left on the file system",
        None,
    ),
)


def explain(words: str) -> tuple[str, str | None] | None:
    """(meaning, hint) of a message; None for an unknown one.

    The name of the object at the beginning ("disk-1: iSCSI: ...") is kept.
    """
    for pattern, sentence, hint in _KNOWN:
        found = re.search(pattern, words)
        if found is not None:
            named = re.match(r"([a-z][a-z0-9-]{0,31}): ", words)
            place = f"{named[1]}: " if named is not None and named.end() <= found.start() else ""
            return place + sentence.format(*(one for one in found.groups() if one is not None)), hint
    return None


def reason_of(migration: Mapping[str, Any]) -> str:
    """Why QEMU did not write all of a machine's memory, from its answer to query-migrate."""
    words = migration.get("error-desc")
    if not words:
        return "QEMU could not write all of it"
    LOG.warning("QEMU could not write memory: %s", words)
    meaning = explain(str(words))
    return "QEMU could not write all of it; see its log" if meaning is None else meaning[0]
