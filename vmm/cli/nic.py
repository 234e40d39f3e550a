# SPDX-License-Identifier: Apache-2.0
"""`nic add`, `remove`, `list`, `show`, `set`: a machine's network adapters, running or not."""

from __future__ import annotations

from typing import Any

import click

from vmm.api.manager import Manager
from vmm.cli.common import VerbGroup, epilog, output_options, print_json, print_line, print_pairs, print_table
from vmm.cli.nic_words import OPTIONS_HELP, parse_nic, parse_options
from vmm.model.errors import VmmError
from vmm.model.spec import AdapterSpec, MachineSpec
from vmm.store import registry


@click.group("nic", cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
def nic_command() -> None:
    """Add, remove, list and change the network adapters of a machine, also while it runs."""


@nic_command.command(
    "add",
    help=f"Add an adapter to the machine NAME, on SWITCH ('-' for none). A running machine gets it at once.\n\n"
    f"Options: {OPTIONS_HELP}.",
    epilog=epilog(
        "vmm nic add web lan", "vmm nic add web lan,vlan=10,bandwidth=100M", "vmm nic add old lan,type=legacy"
    ),
)
@click.argument("name")
@click.argument("nic", metavar="SWITCH[,OPTION=VALUE...]")
@output_options
def add_command(name: str, nic: str, as_json: bool, quiet: bool) -> None:
    """See `help` above."""
    added = Manager().add_adapter(name, **parse_nic(nic))
    if as_json:
        print_json(added.model_dump(mode="json"))
    elif not quiet:
        print_line(f"{name}: {added.id} ({added.kind}, {added.mac}) on {added.switch or 'no switch'}")


@nic_command.command("remove", epilog=epilog("vmm nic remove web nic-1"))
@click.argument("name")
@click.argument("adapter", metavar="ADAPTER")
@output_options
def remove_command(name: str, adapter: str, as_json: bool, quiet: bool) -> None:
    """Remove ADAPTER (its id or MAC address) from the machine NAME. A running guest is asked to release it."""
    removed = Manager().remove_adapter(name, adapter)
    if as_json:
        print_json(removed.model_dump(mode="json"))
    elif not quiet:
        print_line(f"{name}: {removed.id} is removed")


@nic_command.command(
    "set",
    help=f"Change ADAPTER of the machine NAME. If it is running, all but type, mac and queues can change.\n\n"
    f"Options: {OPTIONS_HELP}.",
    epilog=epilog("vmm nic set web nic-0 link=down", "vmm nic set web nic-0 vlan=20 spoofing=on"),
)
@click.argument("name")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("options", metavar="OPTION=VALUE...", nargs=-1)
@click.option(
    "--switch", "switch", metavar="SWITCH", help="Another switch ('-' for none); only while the machine is off."
)
@click.option("--no-vlan", is_flag=True, help="Remove the VLAN.")
@output_options
def set_command(
    name: str, adapter: str, options: tuple[str, ...], switch: str | None, no_vlan: bool, as_json: bool, quiet: bool
) -> None:
    """See `help` above."""
    settings = parse_options(list(options))
    if settings.get("trunk"):
        settings.setdefault("vlan", None)
    if "vlan" in settings and settings["vlan"] is not None:
        settings |= {"trunk": (), "native_vlan": 0}
    if no_vlan:
        settings |= {"vlan": None, "trunk": (), "native_vlan": 0}
    if switch is not None:
        settings["switch"] = None if switch == "-" else switch
    if not settings:
        raise click.UsageError("name an option to change")
    changed = Manager().change_adapter(name, adapter, **settings)
    if as_json:
        print_json(changed.model_dump(mode="json"))
    elif not quiet:
        print_line(f"{name}: {changed.id} is changed")


@nic_command.command("list", epilog=epilog("vmm nic list web"))
@click.argument("name")
@output_options
def list_command(name: str, as_json: bool, quiet: bool) -> None:
    """List the adapters of the machine NAME."""
    from vmm.api.adapters import connection

    machine = registry.load(name)
    found = [(one, connection(machine, one).is_connected) for one in machine.spec.adapters]
    if as_json:
        print_json([{**one.model_dump(mode="json"), "connected": is_connected} for one, is_connected in found])
    elif not quiet:
        rows = [
            [one.id, one.switch or "-", one.kind, one.mac or "-", vlan_words(one), link_words(one, is_connected)]
            for one, is_connected in found
        ]
        print_table(("ADAPTER", "SWITCH", "TYPE", "MAC", "VLAN", "LINK"), rows)


@nic_command.command("show", epilog=epilog("vmm nic show web nic-0"))
@click.argument("name")
@click.argument("adapter", metavar="ADAPTER")
@output_options
def show_command(name: str, adapter: str, as_json: bool, quiet: bool) -> None:
    """Show everything about ADAPTER of the machine NAME: rules, data path and the reason for it, counters."""
    from vmm.api import adapters

    machine = registry.load(name)
    found = adapters.find(machine, adapter)
    status = _port_status(machine.spec, found)
    path = _data_path(found)
    connection = adapters.connection(machine, found)
    if as_json:
        document = {
            **found.model_dump(mode="json"),
            "connected": connection.is_connected,
            "connection": connection.words,
        }
        print_json({**document, "data_path": path, "port": status})
    elif not quiet:
        print_pairs(_pairs(found, path, status, connection.words))


def vlan_words(adapter: AdapterSpec) -> str:
    """The adapter's VLANs, as text."""
    if adapter.trunk:
        native = f", native {adapter.native_vlan}" if adapter.native_vlan else ""
        return f"trunk {'+'.join(map(str, adapter.trunk))}{native}"
    return "-" if adapter.vlan is None else str(adapter.vlan)


def link_words(adapter: AdapterSpec, is_connected: bool | None = None) -> str:
    """Whether the adapter's cable is plugged in, and connected to a switch, as text."""
    if is_connected is False and adapter.switch is not None:
        return "disconnected"
    return "up" if adapter.link_up else "down"


def _pairs(adapter: AdapterSpec, path: str, status: dict[str, Any] | None, words: str) -> list[tuple[str, str]]:
    guards = [name for name in ("dhcp_guard", "router_guard") if getattr(adapter, name)]
    bandwidth, storm = adapter.bandwidth_bits_per_second, adapter.storm_frames_per_second
    pairs = [
        ("adapter", adapter.id),
        ("type", adapter.kind),
        ("mac", adapter.mac or "-"),
        ("switch", adapter.switch or "none"),
        ("connection", words),
        ("data path", path),
        ("vlan", vlan_words(adapter)),
        ("link", link_words(adapter)),
        ("spoofing", "allowed" if adapter.spoofing else "dropped"),
        ("guards", ", ".join(guards).replace("_", " ")),
        ("bandwidth", f"{bandwidth / 1e6:g} Mbit/s" if bandwidth else ""),
        ("storm limit", f"{storm} frames/s" if storm else "off"),
        ("mirror", adapter.mirror if adapter.mirror != "none" else ""),
    ]
    if status is not None:
        drops = ", ".join(f"{reason} {count}" for reason, count in sorted(status["drops"].items()))
        pairs += [
            ("sent", f"{status['received_frames']} frames, {status['received_bytes']} bytes"),
            ("received", f"{status['transmitted_frames']} frames, {status['transmitted_bytes']} bytes"),
            ("dropped", drops),
        ]
    return pairs


def _data_path(adapter: AdapterSpec) -> str:
    from vmm.net import switches
    from vmm.net.adapter import data_path

    if adapter.switch is None:
        return "not connected to a switch"
    try:
        return data_path(adapter, switches.load(adapter.switch).backend)
    except VmmError as error:
        return f"none: {error.problem}"


def _port_status(spec: MachineSpec, adapter: AdapterSpec) -> dict[str, Any] | None:
    from vmm.net import switches
    from vmm.net.adapter import port_name
    from vmm.net.host_side import HostSide

    if adapter.switch is None:
        return None
    try:
        ports = HostSide(switches.load(adapter.switch)).port_status()
    except VmmError:
        return None
    return next((one for one in ports if one["name"] == port_name(spec.id, adapter.id)), None)
