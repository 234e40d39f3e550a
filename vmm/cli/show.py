# SPDX-License-Identifier: Apache-2.0
"""`list` and `show`: which machines there are, and everything about one."""

from __future__ import annotations

import json
from typing import Any

import click

from vmm.cli.common import epilog, format_size, output_options, print_json, print_pairs, print_table
from vmm.cli.integration import guest_pairs
from vmm.errors import to_document
from vmm.manager import MachineInfo, Manager


@click.command("list", epilog=epilog("vmm list", "vmm list --json"))
@output_options
def list_command(as_json: bool, quiet: bool) -> None:
    """All machines and what they are doing.

    A machine whose definition cannot be read is listed with what is wrong with it. With --json: a list of what `vmm
    show --json` prints.
    """
    machines = Manager().machines()
    if as_json:
        print_json([document_of(one) for one in machines])
    elif not quiet:
        rows = [_row(one) for one in machines]
        if rows:
            print_table(("NAME", "STATE", "CPUS", "MEMORY", "DISKS", "UP", "NOTE"), rows, states=1)
        else:
            click.echo("there are no machines: vmm create NAME --disk IMAGE", err=True)


def _row(one: MachineInfo) -> list[str]:
    if one.spec is None:
        return [one.name, "unknown", "-", "-", "-", "-", one.problem.problem if one.problem else ""]
    spec = one.spec
    note = one.reason or (f"{one.operation} under way" if one.operation else "")
    if one.copy_of is not None:
        note = f"a copy of {one.copy_of}: vmm set {one.name} --new-id"
    return [
        one.name,
        one.state.value if one.state else "unknown",
        str(spec.cpu_count),
        format_size(spec.memory_bytes),
        str(len(spec.disks)),
        _duration(one.uptime_seconds),
        note,
    ]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600:d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def document_of(one: MachineInfo) -> dict[str, Any]:
    """A machine for JSON."""
    return {
        "name": one.name,
        "state": one.state.value if one.state else None,
        "reason": one.reason,
        "operation": one.operation,
        "accelerator": one.accelerator,
        "uptime_seconds": one.uptime_seconds,
        "heartbeat": one.heartbeat,
        "guest": one.guest,
        "pids": one.pids,
        "folder": one.folder,
        "definition": None if one.spec is None else json.loads(one.spec.to_json()),
        "copy_of": one.copy_of,
        "problem": None if one.problem is None else to_document(one.problem),
    }


@click.command("show", epilog=epilog("vmm show web", "vmm show web --json"))
@click.argument("name")
@output_options
def show_command(name: str, as_json: bool, quiet: bool) -> None:
    """Everything about the machine NAME: its settings, its disks, and what it is doing."""
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
            ("up", "" if one.uptime_seconds is None else _duration(one.uptime_seconds)),
            ("accelerator", one.accelerator or f"{spec.accelerator} (when started)"),
            ("heartbeat", "" if one.guest else one.heartbeat or ""),
            ("id", spec.id),
            ("memory", format_size(spec.memory_bytes)),
            ("cpus", f"{spec.cpu_count} × {spec.cpu_model}"),
            ("machine type", spec.machine_type),
            ("firmware", spec.firmware),
            ("clock", "local time" if spec.rtc == "local" else ""),
            ("boot order", ", ".join(spec.boot_order)),
            ("kernel", spec.kernel or ""),
            ("initrd", spec.initrd or ""),
            ("arguments", spec.append or ""),
            ("integration", _services(spec.integration.model_dump())),
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
    rows = [
        [disk.id, disk.place, disk.kind + (", read-only" if disk.read_only else ""), format_size(size), disk.serial,
         (disk.path or "empty") + (f"  ({problem})" if problem else "")]
        for disk, size, problem in manager.disks(name)
    ]  # fmt: skip
    if rows:
        click.echo()
        print_table(("DISK", "PLACE", "KIND", "SIZE", "SERIAL", "IMAGE"), rows)


def _services(services: dict[str, bool]) -> str:
    off = [name for name, is_on in services.items() if not is_on]
    return "all services" + (f" but {', '.join(off)}" if off else "")
