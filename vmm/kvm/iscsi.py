# SPDX-License-Identifier: Apache-2.0
"""LUNs that QEMU itself reaches over the network: the iscsi:// URL, and the block device that it becomes in QEMU.

Decides how a URL is read, which LUN it names, whatever the portal, and when the LUN must not be given to a machine.
Pure except for `host_sessions`, which reads where this host itself is logged in. A URL never contains a password,
because URLs are stored in a machine's definition and displayed: it names a file with the password.

    iscsi://[USER@]HOST[:PORT]/TARGET/LUN[?password-file=PATH]

While the target does not answer, the guest's requests wait and libiscsi keeps reconnecting; no time-out is set,
because the target might still carry out a request that was given up.

No claim of ours keeps other hosts away from a LUN: that is up to the target (its access rules, or reservations).

Sources: libiscsi's README (URLs), RFC 3721 (names of targets), RFC 7143, QEMU's BlockdevOptionsIscsi.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from vmm.model.errors import InvalidSpec

SCHEME = "iscsi://"
DEFAULT_PORT = 3260
MAX_NAME_BYTES = 223  # RFC 7143, 4.2.7.1
MAX_LUN = 16383  # the largest flat LUN address
SYNTAX_HINT = "iscsi://[USER@]HOST[:PORT]/TARGET/LUN[?password-file=PATH]"
_TARGET = re.compile(r"iqn\.\d{4}-\d{2}\.[^\s/?#:]+(:[^\s/?#]*)?|eui\.[0-9A-Fa-f]{16}|naa\.[0-9A-Fa-f]{16,32}")


@dataclass(frozen=True, slots=True)
class Lun:
    """A logical unit of a target. `portal` is HOST:PORT, as QEMU expects it."""

    portal: str
    target: str
    number: int
    user: str | None = None
    password_file: str | None = None

    @property
    def identity(self) -> str:
        """The identity, independent of the portal: target names are globally unique."""
        return f"iscsi={self.target},lun={self.number}"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a device or LUN must not be given away; `in_use`: its present user would have to release it first."""

    text: str
    in_use: bool = False

    def __str__(self) -> str:
        return self.text


def is_url(text: str) -> bool:
    """True for a string that is meant as the URL of a LUN."""
    return text.lower().startswith(("iscsi:", "iser:"))


def parse(url: str) -> Lun:
    """Parse a URL. Raises InvalidSpec, which says what is wrong with it."""
    if not url.lower().startswith(SCHEME):
        raise _wrong(url, "does not begin with iscsi://")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _wrong(url, str(error)) from error
    if not host or re.search(r"[\s/]", host):
        raise _wrong(url, "names no host")
    if port == 0:
        raise _wrong(url, "has the port 0")
    if parts.password is not None or "%" in (parts.username or ""):
        # USER%PASSWORD is libiscsi's own form
        raise _wrong(url, "contains a password, which would be stored and shown with it", "use ?password-file=PATH")
    path = [unquote(one) for one in parts.path.split("/")[1:]]
    if len(path) != 2 or not path[1]:
        raise _wrong(url, "does not end with /TARGET/LUN")
    target, number = path[0].lower(), path[1]
    if not _TARGET.fullmatch(target) or len(target.encode()) > MAX_NAME_BYTES:
        raise _wrong(
            url, f"has the target {path[0]!r}, which is not a valid name", "targets are called iqn.YYYY-MM.DOMAIN:NAME"
        )
    if not (number.isascii() and number.isdigit() and int(number) <= MAX_LUN):
        raise _wrong(url, f"has the LUN {number!r}, which is not a number from 0 to {MAX_LUN}")
    user, file = parts.username or None, _password_file(url, parts.query)
    if (user is None) != (file is None) or parts.fragment:
        raise _wrong(url, "must have both a user and a password file, or neither")
    bracketed = f"[{host}]" if ":" in host else host
    return Lun(f"{bracketed}:{port or DEFAULT_PORT}", target, int(number), user, file)


def _password_file(url: str, query: str) -> str | None:
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise _wrong(url, f"has an option without a value: {query}") from error
    if not options:
        return None
    if len(options) > 1 or options[0][0] != "password-file":
        raise _wrong(url, f"has the option {options[-1][0]!r}; the only one is password-file")
    file = options[0][1]
    if not os.path.isabs(file):
        raise _wrong(url, "must have the absolute path of the password file")
    return file


def _wrong(url: str, what: str, hint: str = SYNTAX_HINT) -> InvalidSpec:
    # A password in the URL must not be displayed.
    return InvalidSpec(what, path=re.sub(r"//[^@/]*@", "//...@", url), hint=hint)


def refusals(
    lun: Lun, *, identities: Mapping[str, str], sessions: Iterable[tuple[str, int, str]] = ()
) -> list[Reason]:
    """Why this LUN must not be given to a machine; empty if it may be. Pure.

    `identities`: LUNs that machines already have -> machine; `sessions`: the LUNs that this host's own initiator is
    logged in to, as (target, LUN, device).
    """
    reasons = []
    if lun.identity in identities:
        reasons.append(Reason(f"belongs to the machine {identities[lun.identity]}", in_use=True))
    for target, number, device in sessions:
        if target.lower() == lun.target and number == lun.number:
            what = f"is a disk of this host itself, {device} (pass that through, or log out of the target)"
            reasons.append(Reason(what, in_use=True))
    return reasons


def host_sessions(*, root: str = "/") -> list[tuple[str, int, str]]:
    """The LUNs that this host's own initiator is logged in to: (target, LUN, device)."""
    sessions = os.path.join(root, "sys/class/iscsi_session")
    targets = {}
    for name in _listed(sessions):
        try:
            with open(os.path.join(sessions, name, "targetname"), encoding="utf-8", errors="replace") as file:
                targets[name] = file.read().strip()
        except OSError:
            continue
    found = []
    blocks = os.path.join(root, "sys/class/block")
    for name in _listed(blocks) if targets else ():
        place = os.path.realpath(os.path.join(blocks, name))
        session = re.search(r"/(session\d+)/target[^/]*/\d+:\d+:\d+:(\d+)/block/[^/]+$", place)
        if session and session[1] in targets:
            found.append((targets[session[1]], int(session[2]), f"/dev/{name}"))
    return sorted(found)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def initiator_name(machine_id: str) -> str:
    """The initiator name that a target sees: one for each machine, so that access rules can distinguish machines."""
    return f"iqn.2008-11.org.linux-kvm:{machine_id.lower()}"


def blockdev_of_lun(
    node_name: str, lun: Lun, *, initiator: str, read_only: bool = False, secret_id: str | None = None
) -> dict[str, Any]:
    """QEMU's block device for a LUN; `secret_id` is the object with the password, for a LUN with a user. Pure."""
    assert (lun.user is None) == (secret_id is None)
    who = {} if lun.user is None else {"user": lun.user, "password-secret": secret_id}
    return {
        "driver": "iscsi",
        "node-name": node_name,
        "transport": "tcp",
        "portal": lun.portal,
        "target": lun.target,
        "lun": lun.number,
        "initiator-name": initiator,
        **who,
        "cache": {"direct": True, "no-flush": False},
        "discard": "unmap",
        "read-only": read_only,
    }
