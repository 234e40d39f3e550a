# SPDX-License-Identifier: Apache-2.0
"""`switch create`, `set`, `list`, `show`, `ports`, `addresses`, `lease`, `delete`: virtual network switches.

Decides how switches are described. Which settings are valid is decided in `net.plan`, what happens on the host in
`net.switches`.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import click

from vmm.cli.common import (
    VerbGroup,
    confirm,
    epilog,
    format_size,
    output_options,
    print_aside,
    print_json,
    print_line,
    print_pairs,
    print_table,
)
from vmm.cli.switch_capture import capture_command
from vmm.model import paths
from vmm.model.errors import TimedOut, Unsupported
from vmm.net import plan, switch_spec, switches, watching
from vmm.net.frames import MAX_MTU_BYTES
from vmm.net.host_side import HostSide
from vmm.net.switch_spec import SwitchSpec

WATCH_SECONDS = 1.0  # for a reader, and the unit of the rates


@click.group("switch", cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
def switch_command() -> None:
    """Create, watch and remove virtual network switches: private, internal and external ones."""


switch_command.add_command(capture_command)


@switch_command.command(
    "create",
    epilog=epilog(
        "vmm switch create lab --type private",
        "vmm switch create nat --type internal --nat",
        "vmm switch create lan --type external --nic eth0",
    ),
)
@click.argument("name")
@click.option("--type", "kind", type=click.Choice(["private", "internal", "external"]), default="private",
              help="Guests only; guests and this host; guests, this host and the network of --nic.")  # fmt: skip
@click.option("--nic", "uplink", metavar="INTERFACE", help="The network card of an external switch.")
@click.option("--backend", type=click.Choice(["user", "bridge"]),
              help="user: a process, without root. bridge: the kernel's bridge, for root."
                   " Default: user for private switches and without root.")  # fmt: skip
@click.option("--mtu", "mtu_bytes", type=int, metavar="BYTES",
              help="Largest payload of a frame. Default: the card's; 1500 without one.")  # fmt: skip
@click.option(
    "--host/--no-host", "host", default=True, help="External: whether this host stays connected to the network."
)
@click.option("--host-vlan", type=int, metavar="N", help="The VLAN of this host's adapter on the switch.")
@click.option("--address", metavar="ADDRESS/PREFIX", help="Internal: this host's address. Default: a free network.")
@click.option("--dhcp/--no-dhcp", "dhcp", default=True, help="Internal: whether guests get addresses.")
@click.option(
    "--dhcp-range",
    metavar="FIRST-LAST",
    help="Internal: the addresses that guests get. Default: the upper half of the network.",
)
@click.option("--nat", is_flag=True, help="Internal: let guests reach what this host reaches.")
@click.option("--domain", help="Internal: the guests' domain. Default: vmm.internal.")
@click.option("--forward", "forwards", metavar="tcp:HOST:PORT-GUEST:PORT", multiple=True,
              help="Internal, user back end: forward a port of this host to a guest. Repeatable.")  # fmt: skip
@click.option("--host-loopback", is_flag=True,
              help="Internal, user back end: let guests reach what listens on this host's 127.0.0.1, at the gateway's"
                   " address. Programs there often trust every client that reaches them.")  # fmt: skip
@click.option("--yes", is_flag=True, help="Do not ask before changing this host's network.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, but do nothing.")
@output_options
def create_command(name: str, yes: bool, dry_run: bool, as_json: bool, quiet: bool, **words: Any) -> None:
    """Create a switch called NAME.

    An external switch takes this host's addresses from the card and gives them to a bridge: what will be done is shown
    first, and undone at once if the gateway stops answering. Deleting the switch restores everything.
    """
    switches.refuse_existing(name)  # before planning: an existing switch would conflict with its own plan
    spec = _spec_of(name, words)
    planned = HostSide(spec).backend.plan()
    if planned.refusals:
        hint = plan.VLAN_HINT if plan.VLAN_REFUSAL in planned.refusals else None
        raise Unsupported(f"this host cannot have switch {name}: {'; '.join(planned.refusals)}", hint=hint)
    if not as_json and not quiet:
        for step in planned.steps if dry_run or spec.type == "external" else ():
            print_line(f"{'would ' if dry_run else 'will '}{step}")
        for warning in planned.warnings:
            print_line(f"warning: {warning}")
    if spec.type == "external" and not dry_run:
        confirm("Change this host's network?", yes=yes)
    if not dry_run:
        switches.create(spec)
    if as_json:
        print_json({**spec.model_dump(mode="json"), "warnings": planned.warnings})
    elif not quiet and not dry_run:
        print_line(f"{name}: {_words(spec)}")


def _spec_of(name: str, words: dict[str, Any]) -> SwitchSpec:
    kind = words["kind"]
    root = os.geteuid() == 0
    backend = words["backend"] or ("user" if kind == "private" or (kind == "internal" and not root) else "bridge")
    settings: dict[str, Any] = {"name": name, "type": kind, "backend": backend, "uplink": words["uplink"]}
    settings |= {"host": words["host"], "host_vlan": words["host_vlan"], "nat": words["nat"]}
    settings["mtu_bytes"] = words["mtu_bytes"]
    settings |= {"dhcp": words["dhcp"], "forwards": words["forwards"], "host_loopback": words["host_loopback"]}
    if words["domain"]:
        settings["domain"] = words["domain"]
    if words["dhcp_range"]:
        first, sign, last = words["dhcp_range"].partition("-")
        if not sign:
            raise click.BadParameter("write FIRST-LAST", param_hint="--dhcp-range")
        settings |= {"dhcp_first": first.strip(), "dhcp_last": last.strip()}
    if kind == "internal":
        settings["address"] = words["address"] or switches.free_address()
    elif words["address"]:
        settings["address"] = words["address"]
    return switch_spec.make_switch(**settings)


@switch_command.command("set", epilog=epilog("vmm switch set lan --nic enp3s0", "vmm switch set lab --mtu 9000"))
@click.argument("name")
@click.option("--nic", "uplink", metavar="INTERFACE", help="Its new network card.")
@click.option("--mtu", "mtu_bytes", type=int, metavar="BYTES", help="Largest payload of a frame.")
@click.option("--yes", is_flag=True, help="Do not ask before changing this host's network.")
@output_options
def set_command(name: str, uplink: str | None, mtu_bytes: int | None, yes: bool, as_json: bool, quiet: bool) -> None:
    """Give the external switch NAME another network card, or the same card after it was renamed.

    The old card gets its addresses back before those of the new card move to the switch; if the old card is gone, the
    new card gets them. Machines on the switch stay connected.

    With --mtu any switch carries longer or shorter frames from now on. Adapters of running machines keep their MTU
    until the machines start again; set it in the guest, too.
    """
    if uplink is None and mtu_bytes is None:
        raise click.UsageError("give --nic, --mtu, or both")
    changed = switches.load(name)
    old: list[str] = []
    if uplink is not None:
        confirm("Change this host's network?", yes=yes)
        changed = switches.set_uplink(name, uplink)
    if mtu_bytes is not None:
        changed, old = switches.set_mtu(name, mtu_bytes)
    old = ["/".join(filter(None, _of({"name": one}))) for one in old]
    if as_json:
        print_json({**changed.model_dump(mode="json"), "guests_with_old_mtu": old})
    elif not quiet:
        print_line(f"{name}: {_words(changed)}")
        if old:
            print_line(
                f"these keep their MTU until their machines restart, unless it is set in the guest: {', '.join(old)}"
            )


def _words(spec: SwitchSpec) -> str:
    """The switch in a few words."""
    words = f"{spec.type}, {spec.backend} back end"
    if spec.type == "internal":
        words += f", {spec.address}" + (", NAT" if spec.nat or spec.capabilities.gateway else "")
    if spec.uplink:
        words += f", uplink {spec.uplink}" + ("" if spec.host else ", without this host")
    return words


@switch_command.command("list", epilog=epilog("vmm switch list"))
@output_options
def list_command(as_json: bool, quiet: bool) -> None:
    """List all switches."""
    found = switches.load_all()
    if as_json:
        print_json([spec.model_dump(mode="json") for spec in found])
    elif not quiet:
        rows = [
            [
                spec.name,
                spec.type,
                spec.backend,
                spec.address or spec.uplink or "-",
                _port_count(spec),
            ]
            for spec in found
        ]
        if rows:
            print_table(("SWITCH", "TYPE", "BACK END", "NETWORK", "PORTS"), rows)
        else:
            print_aside("no switches: vmm switch create NAME")


def _port_count(spec: SwitchSpec) -> str:
    """The number of ports, or that the switch's process hangs; the other switches are listed in any case."""
    try:
        return str(len(HostSide(spec).guests()))
    except TimedOut:
        return "does not answer"


@switch_command.command("show", epilog=epilog("vmm switch show nat"))
@click.argument("name")
@output_options
def show_command(name: str, as_json: bool, quiet: bool) -> None:
    """Show everything about the switch NAME: settings, process or bridge, leases."""
    spec = switches.load(name)
    host = HostSide(spec)
    status = host.backend.status()
    leases = _leases(spec)
    wrong = watching.faults(host)
    in_the_way = host.backend.in_the_way()
    if as_json:
        faults = [{"what": one.what, "problem": one.problem} for one in wrong]
        document = {"status": status, "leases": leases, "faults": faults, "in_the_way": in_the_way}
        print_json({**spec.model_dump(mode="json"), **document})
        return
    if quiet:
        return
    gateway = status.get("gateway") if status else None
    pairs = [
        ("switch", spec.name),
        ("id", spec.id),
        ("type", spec.type),
        ("back end", f"{spec.backend}: {host.backend.state(status)}"),
        ("uplink", (spec.uplink or "") + (f" ({spec.uplink_mac})" if spec.uplink_mac else "")),
        ("mtu", str(host.mtu_bytes() or f"what guests choose, up to {MAX_MTU_BYTES}")),
        ("address", spec.address or ""),
        ("host's vlan", str(spec.host_vlan or "")),
        ("dhcp", " to ".join(map(str, spec.dhcp_range)) if spec.type == "internal" and spec.dhcp else ""),
        ("way out", _way_out(spec)),
        ("gateway", "" if gateway is None else ("runs" if gateway["running"] else f"does not run: {gateway['said']}")),
        ("ports", str(len(host.guests()))),
        ("wrong", "; ".join(one.problem for one in wrong if one.what != "gateway")),
    ]
    print_pairs([*pairs, *(("in the way", words) for words in in_the_way)])
    if leases:
        print_table(
            ("ADDRESS", "MAC", "NAME"), [[str(x["address"]), str(x["mac"]), str(x["name"] or "-")] for x in leases]
        )


def _way_out(spec: SwitchSpec) -> str:
    if spec.type != "internal":
        return ""
    if spec.capabilities.gateway:
        own = ", and its 127.0.0.1" if spec.host_loopback else ""
        return f"everything that this host reaches{own}; this host reaches guests only through forwarded ports"
    return "NAT" if spec.nat else "none: guests and this host only"


def _leases(spec: SwitchSpec) -> list[dict[str, Any]]:
    from vmm.net import lease_file

    return lease_file.read(paths.switch_leases(spec.id)) if spec.type == "internal" else []


@switch_command.command("ports", epilog=epilog("vmm switch ports lab", "vmm switch ports lab --watch"))
@click.argument("name")
@click.option("--watch", is_flag=True, help="Repeat every second, with rates, until Ctrl-C.")
@output_options
def ports_command(name: str, watch: bool, as_json: bool, quiet: bool) -> None:
    """Show what is connected to each port of the switch NAME, with counters as the guests see them."""
    spec = switches.load(name)
    host = HostSide(spec)
    before: dict[str, dict[str, Any]] = {}
    while True:
        ports = host.port_status()
        if as_json:
            print_json([{**one, "machine": _of(one)[0], "adapter": _of(one)[1]} for one in ports])
        elif not quiet:
            if watch and sys.stdout.isatty():
                click.clear()
            rows = [_port_row(one, before.get(one["name"])) for one in ports]
            print_table(("MACHINE", "ADAPTER", "VLAN", "LINK", "SENT", "RECEIVED", "DROPPED"), rows)
        if not watch:
            return
        before = {one["name"]: one for one in ports}
        time.sleep(WATCH_SECONDS)  # until Ctrl-C


def _of(port: dict[str, Any]) -> tuple[str, str]:
    from vmm.store.registry import machine_of_port

    return machine_of_port(port["name"])


def _port_row(port: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    def counted(way: str) -> str:
        total = f"{port[f'{way}_frames']} ({format_size(port[f'{way}_bytes'])})"
        if before is None:
            return total
        bits = (port[f"{way}_bytes"] - before[f"{way}_bytes"]) * 8 / WATCH_SECONDS
        return f"{total}, {bits / 1e6:.1f} Mbit/s"

    machine, adapter = _of(port)
    vlan = "trunk " + "+".join(map(str, port["allowed"])) if port["mode"] == "trunk" else str(port["vlan"] or "-")
    link = "down" if not port["link_up"] else "up" if port["connected"] else "none"
    drops = ", ".join(f"{reason} {count}" for reason, count in sorted(port["drops"].items())) or "-"
    return [machine, adapter or "-", vlan, link, counted("received"), counted("transmitted"), drops]


@switch_command.command("addresses", epilog=epilog("vmm switch addresses lab"))
@click.argument("name")
@output_options
def addresses_command(name: str, as_json: bool, quiet: bool) -> None:
    """Show which MAC addresses the switch NAME has learned, and at which port."""
    known = HostSide(switches.load(name)).backend.addresses()
    if as_json:
        print_json(known)
    elif not quiet:
        rows = [
            [one["mac"], str(one["vlan"] or "-"), " ".join(_of({"name": one["port"]})), str(one["age_seconds"])]
            for one in known
        ]
        print_table(("MAC", "VLAN", "PORT", "SECONDS"), rows)


@switch_command.command("lease", epilog=epilog("vmm switch lease nat web/nic-0 10.77.0.10"))
@click.argument("name")
@click.argument("adapter", metavar="MACHINE/ADAPTER")
@click.argument("address", required=False)
@click.option("--remove", is_flag=True, help="Remove the fixed address.")
@output_options
def lease_command(name: str, adapter: str, address: str | None, remove: bool, as_json: bool, quiet: bool) -> None:
    """Always give ADAPTER the same ADDRESS, and its machine's name, on the internal switch NAME.

    The address must be in the switch's network, and be neither this host's nor another adapter's.
    """
    from vmm.api import adapters
    from vmm.net import guest_addresses, lease_file
    from vmm.store import registry

    if (address is None) != remove:
        raise click.UsageError("give an address, or --remove")
    switches.load(name)
    machine, _, adapter_id = adapter.partition("/")
    found = registry.load(machine)
    mac = adapters.find(found, adapter_id).mac
    assert mac is not None

    def with_lease(spec: switch_spec.SwitchSpec) -> switch_spec.SwitchSpec:
        if address is None:
            return guest_addresses.without_fixed(spec, mac, adapter)
        host_name = "".join(c if c.isalnum() and c.isascii() else "-" for c in machine.lower()).strip("-") or None
        held = lease_file.read(paths.switch_leases(spec.id))
        return guest_addresses.with_fixed(spec, mac, address, host_name, held, time.time())

    changed = switches.change(name, with_lease)
    if as_json:
        print_json(changed.model_dump(mode="json")["leases"])
    elif not quiet:
        print_line(
            f"{name}: {adapter} has " + (f"{address} from its next lease on" if address else "no fixed address")
        )


@switch_command.command("delete", epilog=epilog("vmm switch delete lab"))
@click.argument("name")
@click.option("--force", is_flag=True, help="Delete it even with machines on it, which are disconnected until a switch"
              " of that name exists again. What cannot be put back is listed and left as it is.")  # fmt: skip
@output_options
def delete_command(name: str, force: bool, as_json: bool, quiet: bool) -> None:
    """Delete the switch NAME, and restore this host's network.

    --force is needed if machines, running or not, are connected to the switch, or if something cannot be put back.
    Settings of a card that no longer exists are listed.
    """
    from vmm.api.adapters import delete_switch

    done = delete_switch(name, force=force)
    if as_json:
        print_json({"deleted": name, "disconnected": done.disconnected, "not_put_back": done.not_put_back})
        return
    for words in done.not_put_back:
        click.echo(f"not put back: {words}", err=True)
    if not quiet:
        left = f"; disconnected: {', '.join(done.disconnected)}" if done.disconnected else ""
        print_line(f"{name} is deleted{left}")
