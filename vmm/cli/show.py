# SPDX-License-Identifier: Apache-2.0
"""`list` and `show`: all machines, and everything about one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from vmm.api.manager import MachineInfo, Manager
from vmm.cli.common import epilog, format_size, output_options, print_aside, print_json, print_pairs, print_table
from vmm.cli.integration import guest_pairs
from vmm.model.errors import to_document
from vmm.model.spec import AdapterSpec, MachineSpec
from vmm.store.state import MachineState

if TYPE_CHECKING:
    from vmm.api.adapters import AdapterConnection


@click.command("list", epilog=epilog("vmm list", "vmm list --json"))
@output_options
def list_command(as_json: bool, quiet: bool) -> None:
    """List all machines, their states, and the addresses that their guest agents report.

    A machine whose definition cannot be read is listed with the reason. With --json: a list of what `vmm show --json`
    prints.
    """
    machines = Manager().machines(guest=True)
    if as_json:
        print_json([document_of(one) for one in machines])
    elif not quiet:
        rows = [_row(one) for one in machines]
        if rows:
            print_table(("NAME", "STATE", "CPUS", "MEMORY", "DISKS", "ADAPTERS", "UP", "NOTE"), rows, states=1)
        else:
            print_aside("no machines: vmm create NAME --disk IMAGE")


def _row(one: MachineInfo) -> list[str]:
    if one.spec is None:
        return [one.name, "unknown", "-", "-", "-", "-", "-", one.problem.problem if one.problem else ""]
    now = one.running or one.spec
    note = one.reason or (f"{one.operation} in progress" if one.operation else "")
    if one.copy_of is not None:
        note = f"a copy of {one.copy_of}: vmm set {one.name} --new-id"
    elif later := _later(one):
        note = "; ".join(part for part in (note, later) if part)
    return [
        one.name,
        one.state.value if one.state else "unknown",
        str(now.cpu_count),
        format_size(now.memory_bytes),
        str(len(one.spec.disks)),
        _adapters_in_short(one),
        _duration(one.uptime_seconds),
        note,
    ]


def _adapters_in_short(one: MachineInfo) -> str:
    """The adapters' switches, and the addresses that the guest has on them."""
    assert one.spec is not None
    words = []
    for adapter in one.spec.adapters:
        found = addresses_of(one, adapter)
        words.append(" ".join([adapter.switch or "none", *(address.partition("/")[0] for address in found[:1])]))
    return ", ".join(words) or "-"


def addresses_of(one: MachineInfo, adapter: AdapterSpec) -> list[str]:
    """The addresses, with prefixes, that the guest reports for the adapter's MAC address, link-local ones last."""
    interfaces = one.guest.interfaces if one.guest is not None else ()
    mac = (adapter.mac or "").lower()
    found = [word for card in interfaces if card.mac.lower() == mac for word in card.addresses]
    return sorted(found, key=lambda word: word.startswith("fe80:"))


def _later(one: MachineInfo) -> str:
    """Settings that take effect at the next start, in a few words."""
    words = []
    for name, value in one.at_next_start.items():
        if name == "memory_bytes" and isinstance(value, int):
            words.append(format_size(value))
        elif name == "cpu_count":
            words.append(f"{value} cpu{'s' if value != 1 else ''}")
        else:
            words.append(name.replace("_", " "))
    return f"at next start: {', '.join(words)}" if words else ""


def _at_next_start(one: MachineInfo, name: str, words: str) -> str:
    """ " (WORDS at next start)" if that setting will be different then."""
    return f" ({words} at next start)" if name in one.at_next_start else ""


def _duration(seconds: float | None) -> str:
    """ "42 s", "5 min 02 s", "3 h 05 min", "2 d 3 h"; "-" if unknown."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _filling_words(one: MachineInfo) -> str:
    """How far the disks are filled from a backup."""
    if one.filling is None:
        return ""
    filling = one.filling
    words = f"from {filling.source}"
    if filling.step == "comparing":
        words += f", {filling.disk}: its night is compared with its sums first"
    elif filling.total_bytes:
        words += f", {filling.disk}: {(filling.done_bytes or 0) * 100 // filling.total_bytes} % of"
        words += f" {format_size(filling.total_bytes)}"
    elif one.state not in (MachineState.RUNNING, MachineState.PAUSED, MachineState.CRITICAL):
        words += ", while the machine runs"
    return words + (f"; waits: {filling.problem}" if filling.problem else "")


def document_of(one: MachineInfo) -> dict[str, Any]:
    """A machine as a JSON document."""
    return {
        "name": one.name,
        "state": one.state.value if one.state else None,
        "reason": one.reason,
        "operation": one.operation,
        "filling": None if one.filling is None else asdict(one.filling),
        "accelerator": one.accelerator,
        "uptime_seconds": one.uptime_seconds,
        "heartbeat": one.heartbeat,
        "guest": None if one.guest is None else asdict(one.guest),
        "pids": one.pids,
        "folder": one.folder,
        "definition": None if one.spec is None else json.loads(one.spec.to_json()),
        "running": None if one.running is None else json.loads(one.running.to_json()),
        "at_next_start": one.at_next_start,
        "adapters": _adapter_documents(one),
        "copy_of": one.copy_of,
        "problem": None if one.problem is None else to_document(one.problem),
    }


def _adapter_documents(one: MachineInfo) -> list[dict[str, Any]]:
    if one.spec is None or not one.spec.adapters:
        return []
    return [
        {"id": adapter.id, "switch": adapter.switch, "mac": adapter.mac, "connected": found.is_connected,
         "connection": found.words, "addresses": addresses_of(one, adapter)}
        for adapter, found in _connections(one)
    ]  # fmt: skip


def _connections(one: MachineInfo) -> list[tuple[AdapterSpec, AdapterConnection]]:
    """Each adapter, and whether it is connected to its switch."""
    from vmm.api.adapters import connection
    from vmm.store import registry

    assert one.spec is not None
    machine = registry.load(one.name)
    return [(adapter, connection(machine, adapter)) for adapter in one.spec.adapters]


@click.command("show", epilog=epilog("vmm show web", "vmm show web --json"))
@click.argument("name")
@output_options
def show_command(name: str, as_json: bool, quiet: bool) -> None:
    """Show everything about the machine NAME: its settings, disks and adapters, and its state.

    Settings that a running machine gets only at its next start are marked.

    \b
    With --json: one object; what is unknown, or not running, is null:
      name state reason operation accelerator uptime_seconds heartbeat folder
      copy_of
      filling {source disk done_bytes total_bytes problem step}   from a backup
      guest {heartbeat seen_seconds_ago os interfaces [{name mac addresses}]}
      pids {supervisor worker server qemu}
      definition {...}     as stored: memory_bytes cpu_count disks [...] ...
      running {...}        the definition that it runs with
      at_next_start {...}  the settings in which the two differ, as they will be
      adapters [{id switch mac connected connection addresses}]
      problem {kind exit_code message problem machine path hint}
    """
    manager = Manager()
    one = manager.show(name, guest=True)
    if as_json:
        print_json(document_of(one))
        return
    if quiet:
        return
    spec = one.spec
    assert spec is not None and one.state is not None
    print_pairs(
        [
            ("name", spec.name),
            ("state", one.state.value + (f": {one.reason}" if one.reason else "")),
            ("copy of", "" if one.copy_of is None else f"{one.copy_of}; vmm set {one.name} --new-id"),
            ("busy with", one.operation or ""),
            ("filling", _filling_words(one)),
            ("up", "" if one.uptime_seconds is None else _duration(one.uptime_seconds)),
            ("accelerator", one.accelerator or f"{spec.accelerator} (when started)"),
            ("heartbeat", "" if one.guest else one.heartbeat or ""),
            ("id", spec.id),
            *_hardware_pairs(one, spec),
            (
                "automatic",
                f"start {spec.automatic.start}, stop {spec.automatic.stop}, recovery {spec.automatic.recovery}",
            ),
            ("folder", one.folder or ""),
            ("processes", ", ".join(f"{part} {pid}" for part, pid in (one.pids or {}).items())),
            ("notes", spec.notes),
            *(guest_pairs(one.guest) if one.guest else ()),
        ]
    )
    _print_adapters(one)
    rows = [
        [disk.id, disk.place, disk.kind_word + (", read-only" if disk.read_only else ""), format_size(info.size_bytes),
         disk.serial, (disk.path or "empty") + (f"  ({info.problem})" if info.problem else "")]
        for info in manager.disks(name) for disk in (info.disk,)
    ]  # fmt: skip
    if rows:
        click.echo()
        print_table(("DISK", "PLACE", "KIND", "SIZE", "SERIAL", "IMAGE"), rows)


def _hardware_pairs(one: MachineInfo, spec: MachineSpec) -> list[tuple[str, str]]:
    """The hardware that the machine has now, and in brackets what it gets at its next start."""

    def words_of(name: str, of: MachineSpec) -> str:
        if name == "memory_bytes":
            return format_size(of.memory_bytes)
        if name == "boot_order":
            return ", ".join(of.boot_order)
        if name == "rtc":
            return "local time" if of.rtc == "local" else "UTC"
        if name == "integration":
            return _services(of.integration.model_dump())
        value = getattr(of, name)
        return ("on" if value else "off") if isinstance(value, bool) else str(value if value is not None else "")

    named = {
        "memory": "memory_bytes", "cpus": "cpu_count", "cpu model": "cpu_model", "machine type": "machine_type",
        "firmware": "firmware", "clock": "rtc", "boot order": "boot_order", "kernel": "kernel", "initrd": "initrd",
        "arguments": "append", "screen": "screen", "integration": "integration",
    }  # fmt: skip
    now = one.running or spec
    return [
        (label, words_of(name, now) + _at_next_start(one, name, words_of(name, spec) or "none"))
        for label, name in named.items()
    ]


def _print_adapters(one: MachineInfo) -> None:
    assert one.spec is not None
    if not one.spec.adapters:
        return
    rows = [
        [
            adapter.id,
            adapter.switch or "-",
            adapter.mac or "-",
            ", ".join(addresses_of(one, adapter)) or "-",
            found.words,
        ]
        for adapter, found in _connections(one)
    ]
    click.echo()
    print_table(("ADAPTER", "SWITCH", "MAC", "ADDRESSES", "CONNECTION"), rows)


def _services(services: dict[str, bool]) -> str:
    off = [name for name, is_on in services.items() if not is_on]
    return "all services" + (f" except {', '.join(off)}" if off else "")
