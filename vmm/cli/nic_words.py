# SPDX-License-Identifier: Apache-2.0
"""How an adapter is written as one argument, SWITCH[,OPTION=VALUE...], and how a bandwidth is written.

Decides only the syntax; which values are valid is decided in `spec`. Imports little, because `create` uses it, too.
"""

from __future__ import annotations

import re
from typing import Any

import click

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:bit(?:/s)?)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
OPTIONS_HELP = (
    "type=synthetic|legacy, mac=ADDRESS, vlan=N, trunk=N+N-N, native=N, queues=N, spoofing=on|off, dhcp-guard=on|off, "
    "router-guard=on|off, bandwidth=RATE (such as 100M, in bits/s), storm=FRAMES-PER-SECOND|off, "
    "mirror=none|source|destination, link=up|down"
)


def parse_rate(text: str) -> int:
    """Parse bits a second: 8000000, 100M, 1.5Gbit. Raises BadParameter."""
    found = _RATE.fullmatch(text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r} is not a bandwidth: write 100M or 1G, in bits per second")
    return int(float(found[1]) * _FACTORS[found[2].upper()])


def parse_vlans(text: str) -> list[int]:
    """Parse "10+20-22" as [10, 20, 21, 22]. Raises BadParameter."""
    found: set[int] = set()
    for part in text.split("+"):
        first, sign, last = part.partition("-")
        last = last if sign else first
        if not first.isdecimal() or not last.isdecimal():
            raise click.BadParameter(f"{text!r} is not a list of VLANs: write 10+20 or 10-19")
        if not 1 <= int(first) <= int(last) <= 4094:
            raise click.BadParameter(f"{part!r}: a VLAN is a number from 1 to 4094")
        found |= set(range(int(first), int(last) + 1))
    return sorted(found)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise click.BadParameter(f"{text!r} is not a number")
    return int(text)


def _flag(text: str) -> bool:
    if text not in ("on", "off"):
        raise click.BadParameter(f"{text!r} is neither on nor off")
    return text == "on"


def _storm(text: str) -> int:
    return 0 if text == "off" else _number(text)


def _link(text: str) -> bool:
    if text not in ("up", "down"):
        raise click.BadParameter(f"{text!r} is neither up nor down")
    return text == "up"


def _mac(text: str) -> str:
    return text.lower().replace("-", ":")


_OPTIONS: dict[str, tuple[str, Any]] = {
    "type": ("kind", str),
    "mac": ("mac", _mac),
    "vlan": ("vlan", _number),
    "trunk": ("trunk", parse_vlans),
    "native": ("native_vlan", _number),
    "queues": ("queues", _number),
    "spoofing": ("spoofing", _flag),
    "dhcp-guard": ("dhcp_guard", _flag),
    "router-guard": ("router_guard", _flag),
    "bandwidth": ("bandwidth_bits_per_second", parse_rate),
    "storm": ("storm_frames_per_second", _storm),
    "mirror": ("mirror", str),
    "link": ("link_up", _link),
}


def parse_options(words: list[str]) -> dict[str, Any]:
    """Parse OPTION=VALUE words into settings of `AdapterSpec`. Raises BadParameter."""
    settings: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if name not in _OPTIONS or not sign or not value:
            raise click.BadParameter(f"{word!r} is not an option of an adapter; the options are {', '.join(_OPTIONS)}")
        key, convert = _OPTIONS[name]
        settings[key] = convert(value)
    if settings.get("vlan") is not None and "trunk" not in settings:
        settings.setdefault("trunk", ())
    return settings


def parse_nic(word: str) -> dict[str, Any]:
    """Parse SWITCH[,OPTION=VALUE...] into settings of `AdapterSpec`; the switch "-" is none. Raises BadParameter."""
    switch, *options = word.split(",")
    if not switch or "=" in switch:
        raise click.BadParameter(f"{word!r} does not name a switch (write - for none)")
    return {"switch": None if switch == "-" else switch, **parse_options(options)}
