# SPDX-License-Identifier: Apache-2.0
"""Rules of other programs' firewalls that block a switch, and what must be added to them.

Decides which of the host's rules drop what a switch needs: a chain that forwards nothing (Docker, ufw, firewalld), a
chain that rejects incoming DHCP and DNS, rules that name a card whose packets arrive at the bridge from then on. A
chain that accepts anything by the bridge's name is considered open: its other conditions are its owner's choice.
Reads, changes nothing: each owner has a way of its own to make rules permanent. Must not know our own rules.

`nft -j list ruleset` also shows iptables-nft's rules; those of iptables-legacy are read by its own command
(libnftables-json(5)).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from vmm.net import settings
from vmm.net.switch_spec import SwitchSpec

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_SECONDS = 10.0
_OURS = "vmm_"
_VIA_IPTABLES = ("filter", "nat", "mangle", "raw", "security")

Chain = tuple[str, str, str]  # family, table, name


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A rule that blocks the switch, and the commands that help."""

    words: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.words}: {self.remedy}"


@dataclass(frozen=True, slots=True)
class Ruleset:
    """The rules of other programs: nft's objects, its rules as text by handle, iptables-legacy's lines."""

    objects: tuple[Mapping[str, Any], ...] = ()
    texts: Mapping[tuple[Chain, int], str] = field(default_factory=dict)
    legacy: tuple[str, ...] = ()
    filters_bridges: bool = False  # br_netfilter passes frames between a bridge's ports to the chains that forward


def obstacles(spec: SwitchSpec, rules: Ruleset) -> list[Obstacle]:
    """The rules among these that block the switch. Pure."""
    reader = _Reader(spec, rules)
    found: list[Obstacle] = []
    if (spec.type == "internal" and spec.nat) or rules.filters_bridges:
        found += reader.closed("forward")
    if spec.type == "internal":
        found += reader.closed("input")
    if spec.type == "external" and spec.host:
        found += reader.by_card()
    return [*found, *_legacy(spec, rules)]


class _Reader:
    """The rules of other programs, by chain."""

    def __init__(self, spec: SwitchSpec, rules: Ruleset) -> None:
        self._spec = spec
        self._texts = dict(rules.texts)
        self._chains: dict[Chain, Mapping[str, Any]] = {}
        self._rules: dict[Chain, list[Mapping[str, Any]]] = {}
        for one in rules.objects:
            for kind, body in one.items():
                if kind not in ("chain", "rule") or str(body.get("table", "")).startswith(_OURS):
                    continue
                name = body["name"] if kind == "chain" else body["chain"]
                key = (str(body["family"]), str(body["table"]), str(name))
                if kind == "chain":
                    self._chains[key] = body
                else:
                    self._rules.setdefault(key, []).append(body)

    def closed(self, hook: str) -> Iterator[Obstacle]:
        """The chains at that hook that drop what none of their rules accepts, and have no rule for the bridge."""
        for key, chain in self._chains.items():
            if chain.get("hook") != hook or chain.get("type") != "filter" or key[0] not in ("ip", "inet"):
                continue
            if self._drops_the_rest(key, chain) and not self._knows_bridge(key):
                what = "forwards" if hook == "forward" else "lets in"
                who = "guests' packets are" if hook == "forward" else "what guests ask this host for (DHCP, names) is"
                words = f"the chain {' '.join(key)} {what} only what its rules name, so {who} dropped"
                yield Obstacle(words, self._remedy(key, hook))

    def by_card(self) -> Iterator[Obstacle]:
        """The rules with the name of the card, whose packets then enter and leave at the bridge."""
        for key, rules in self._rules.items():
            for rule in rules if key[0] in ("ip", "ip6", "inet") else ():
                if self._spec.uplink in set(_interfaces(rule)):
                    yield self._by_card(key, rule)

    def _by_card(self, key: Chain, rule: Mapping[str, Any]) -> Obstacle:
        card, bridge = str(self._spec.uplink), self._spec.bridge_name
        text = self._texts.get((key, int(rule.get("handle", 0))), "")
        words = f"a rule of {' '.join(key)} matches {card}, whose packets will be {bridge}'s"
        if text:
            words += f" ({text})"
        if _is_iptables(key) or not text:
            command = "ip6tables" if key[0] == "ip6" else "iptables"
            return Obstacle(words, f"add the same rule with {bridge} ({command}-save | grep {card})")
        where = f"{' '.join(key)} position {rule['handle']}"
        return Obstacle(words, f"nft insert rule {where} {text.replace(card, bridge)}")

    def _drops_the_rest(self, key: Chain, chain: Mapping[str, Any]) -> bool:
        if chain.get("policy") == "drop":
            return True
        return any(
            {"drop", "reject"} & _verdicts(rule) and not any("match" in one for one in _expressions(rule))
            for rule in self._rules.get(key, ())
        )

    def _knows_bridge(self, key: Chain, seen: frozenset[Chain] = frozenset()) -> bool:
        """True if a rule that is reached from the chain accepts something by the bridge's name."""
        for rule in self._rules.get(key, ()):
            ours = any(fnmatchcase(self._spec.bridge_name, name) for name in _interfaces(rule))
            if ours and _verdicts(rule) & {"accept", "jump", "goto"}:
                return True
            for target in _targets(rule):
                there = (key[0], key[1], target)
                if there not in seen and self._knows_bridge(there, seen | {key, there}):
                    return True
        return False

    def _remedy(self, key: Chain, hook: str) -> str:
        bridge = self._spec.bridge_name
        family, table, name = key
        names = {other[2] for other in self._chains if other[:2] == key[:2]}
        if table == "firewalld":
            return f"firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload"
        if any(one.startswith("ufw-") for one in names):
            return f"ufw route allow in on {bridge}" if hook == "forward" else f"ufw allow in on {bridge}"
        if not _is_iptables(key):
            add = f"nft insert rule {family} {table} {name}"
            answers = f' && {add} oifname "{bridge}" ct state established,related accept' if hook == "forward" else ""
            return f'{add} iifname "{bridge}" accept{answers}'
        return _iptables("iptables", "DOCKER-USER" if hook == "forward" and "DOCKER-USER" in names else name, bridge)


def _iptables(command: str, chain: str, bridge: str) -> str:
    words = f"{command} -I {chain} -i {bridge} -j ACCEPT"
    if chain != "INPUT":
        words += f" && {command} -I {chain} -o {bridge} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
    return words


def _is_iptables(key: Chain) -> bool:
    return key[0] in ("ip", "ip6") and key[1] in _VIA_IPTABLES and key[2].isupper()


def _expressions(rule: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for one in rule.get("expr", ()) if isinstance(one, dict)]


def _verdicts(rule: Mapping[str, Any]) -> set[str]:
    return {kind for one in _expressions(rule) for kind in one}


def _targets(rule: Mapping[str, Any]) -> Iterator[str]:
    for one in _expressions(rule):
        for kind in ("jump", "goto"):
            if kind in one:
                yield str(one[kind]["target"])


def _interfaces(rule: Mapping[str, Any]) -> Iterator[str]:
    """The names of interfaces, or patterns, that a rule matches; not those that it excludes."""
    for one in _expressions(rule):
        match = one.get("match", {})
        key = match.get("left", {}).get("meta", {}).get("key") if isinstance(match.get("left"), dict) else None
        if key in ("iif", "oif", "iifname", "oifname") and match.get("op") in ("==", "in"):
            right = match.get("right")
            values = right.get("set", ()) if isinstance(right, dict) else right if isinstance(right, list) else [right]
            yield from (value for value in values if isinstance(value, str))


def _legacy(spec: SwitchSpec, rules: Ruleset) -> Iterator[Obstacle]:
    """The same for iptables-legacy, whose rules nft does not show."""
    bridge, command = spec.bridge_name, "iptables-legacy"
    wanted = ["INPUT"] if spec.type == "internal" else []
    if (spec.type == "internal" and spec.nat) or rules.filters_bridges:
        wanted.append("FORWARD")
    for chain in wanted:
        known = any(bridge in line.split() for line in rules.legacy)
        if f"-P {chain} DROP" in rules.legacy and not known:
            words = f"the chain {chain} of {command} drops what its rules do not name"
            yield Obstacle(words, _iptables(command, chain, bridge))
    if spec.type == "external" and spec.host:
        for line in rules.legacy:
            words_of_line = line.split()
            if spec.uplink in words_of_line:
                same = " ".join(bridge if word == spec.uplink else word for word in words_of_line)
                words = f"a rule of {command} matches {spec.uplink}, whose packets will be {bridge}'s ({line})"
                yield Obstacle(words, f"{command} {same}")


# -- reading ----------------------------------------------------------------------------------------------------


def present() -> Ruleset:
    """The rules of this host; what cannot be read counts as absent."""
    try:
        objects = json.loads(_said("nft", "-j", "list", "ruleset") or "{}").get("nftables", [])
    except ValueError:
        objects = []
    return Ruleset(
        tuple(one for one in objects if isinstance(one, dict)),
        dict(_by_handle(_said("nft", "-a", "-s", "list", "ruleset").splitlines())),
        tuple(line.strip() for line in _said("iptables-legacy", "-S").splitlines()),
        settings.value("net/bridge/bridge-nf-call-iptables") == "1",
    )


def _said(program: str, *arguments: str) -> str:
    path = shutil.which(program, path=_PATH)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _by_handle(lines: Iterable[str]) -> Iterator[tuple[tuple[Chain, int], str]]:
    """Rules as `nft -a` prints them: tables and chains open with a brace, each rule ends with its handle."""
    family = table = chain = ""
    for line in map(str.strip, lines):
        text, sign, handle = line.rpartition(" # handle ")
        words = text.split()
        if text.endswith("{") and words[0] == "table":
            family, table = words[1], words[2]
        elif text.endswith("{") and words[0] == "chain":
            chain = words[1]
        elif sign and handle.isdecimal():
            yield ((family, table, chain), int(handle)), text
