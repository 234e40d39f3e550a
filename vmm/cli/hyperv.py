# SPDX-License-Identifier: Apache-2.0
"""`hyperv`: what the configuration of a Hyper-V machine says."""

from __future__ import annotations

import datetime
import os
from dataclasses import asdict
from typing import Any

import click

from vmm.cli.common import (
    VerbGroup,
    epilog,
    format_size,
    output_options,
    print_aside,
    print_json,
    print_line,
    print_pairs,
    print_table,
)
from vmm.hyperv.configuration import configuration
from vmm.hyperv.ids import SECURE_BOOT_TEMPLATES, plain
from vmm.hyperv.machine import Feature, HyperVAdapter, HyperVDrive, HyperVMachine
from vmm.hyperv.reading import read

MIB = 1 << 20
_STARTS = {0: "nothing", 1: "start if it ran", 2: "start"}
_STOPS = {0: "power off", 1: "save", 2: "shut down"}
_CRASHES = {0: "nothing", 1: "restart", 2: "go back to the last checkpoint"}


@click.group("hyperv", cls=VerbGroup)
def hyperv_command() -> None:
    """Look at machines of Hyper-V."""


@hyperv_command.command(
    "show",
    epilog=epilog(
        "vmm hyperv show 'Virtual Machines/0AA394FA-7C4A-4070-BA32-773D43B28A68.vmcx'",
        "vmm hyperv show Snapshots/AAAAAAA1-0000-4000-8000-000000000001.xml --json",
    ),
)
@click.argument("file", type=click.Path())
@output_options
def show_command(file: str, as_json: bool, quiet: bool) -> None:
    """Show what FILE, the configuration of a machine or of a checkpoint, says.

    Configurations in XML (Windows Server 2008 to 2012 R2) and VMCX (2016 and later) are read. Keys that vmm does not
    know are listed at the end. FILE is never changed, not even if its log has to be replayed.
    """
    path = os.path.abspath(file)
    machine = configuration(path, read(path))
    if as_json:
        print_json(_document(machine))
    elif not quiet:
        _show(machine)


def _document(machine: HyperVMachine) -> dict[str, Any]:
    document = asdict(machine)
    for adapter in document["adapters"]:
        for feature in adapter["features"]:
            feature["data"] = feature["data"].hex()
    document["unknown"] = [{"key": key, "value": value} for key, value in machine.unknown]
    return document


def _show(machine: HyperVMachine) -> None:
    print_pairs([(name, value) for name, value in _pairs(machine) if value])
    if machine.drives:
        print_line("")
        print_table(("PLACE", "KIND", "PATH"), [_drive(one) for one in machine.drives])
    if machine.adapters:
        print_line("")
        print_table(("ADAPTER", "MAC", "SWITCH", "SETTINGS"), [_adapter(one) for one in machine.adapters])
    if machine.devices:
        print_line("")
        print_table(("DEVICE", "INSTANCE"), [[one.name or one.kind, one.instance] for one in machine.devices])
    if machine.unknown:
        print_line("")
        print_table(("UNKNOWN KEY", "VALUE"), [[key, value] for key, value in machine.unknown])
    for doubt in machine.doubts:
        print_aside(f"doubtful: {doubt}")


def _pairs(machine: HyperVMachine) -> list[tuple[str, str]]:
    memory, processors, firmware = machine.memory, machine.processors, machine.firmware
    power, saved = machine.power, machine.saved
    words = format_size(memory.start_mib * MIB)
    if memory.is_dynamic:
        least, most = memory.minimum_mib or 0, memory.maximum_mib or 0
        words += f", dynamic from {format_size(least * MIB)} to {format_size(most * MIB)}"
    secure = ""
    if firmware.secure_boot:
        template = firmware.secure_boot_template or ""
        secure = SECURE_BOOT_TEMPLATES.get(plain(template), template) or "on"
    return [
        ("name", machine.name),
        ("kind", f"checkpoint of {machine.machine_id}" if machine.is_checkpoint else "machine"),
        ("id", machine.id),
        ("notes", " / ".join(machine.notes.splitlines())),
        ("generation", str(machine.generation)),
        ("version", machine.version),
        ("created", _moment(machine.created_seconds)),
        ("memory", words),
        ("processors", _processors(processors.count, processors.limit, processors.weight)),
        ("nested", "yes" if processors.is_nested else ""),
        ("SCSI controllers", str(machine.scsi_controllers)),
        ("serial ports", ", ".join(f"COM{n}: {pipe}" for n, pipe in enumerate(machine.com_ports, 1) if pipe)),
        ("BIOS id", firmware.bios_guid or ""),
        ("serial number", firmware.serial or ""),
        ("asset tag", firmware.asset_tag or ""),
        ("boots from", ", ".join(firmware.boot_order) if machine.generation == 1 else ""),
        ("Secure Boot", secure),
        ("TPM", "yes" if machine.has_tpm else ""),
        ("shielded", "yes" if machine.is_shielded else ""),
        ("clock", f"{machine.clock_skew_seconds} s from UTC" if machine.clock_skew_seconds else ""),
        ("at host's start", _action(power.at_host_start, _STARTS)),
        ("at host's stop", _action(power.at_host_stop, _STOPS)),
        ("after a crash", _action(power.after_crash, _CRASHES)),
        ("saved state", " ".join((saved.kind, *saved.places)) if saved is not None else ""),
        ("unfinished", "a merge of its disks" if machine.merge_pending else ""),
    ]


def _processors(count: int, limit: int, weight: int) -> str:
    words = [str(count)]
    if limit != 100_000:
        words.append(f"at most {limit / 1000:g} %")
    if weight != 100:
        words.append(f"weight {weight}")
    return ", ".join(words)


def _moment(seconds: int | None) -> str:
    if seconds is None:
        return ""
    start = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    try:
        return (start + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S UTC")
    except OverflowError:
        return f"{seconds} s after 1970"


def _action(number: int | None, words: dict[int, str]) -> str:
    return "" if number is None else words.get(number, str(number))


def _drive(drive: HyperVDrive) -> list[str]:
    notes = [word for word, holds in (("shared", drive.is_shared), ("pool", bool(drive.pool_id))) if holds]
    kind = f"{drive.kind} ({', '.join(notes)})" if notes else drive.kind
    return [f"{drive.bus} {drive.controller}:{drive.unit}", kind, drive.path or "-"]


def _adapter(adapter: HyperVAdapter) -> list[str]:
    mac = f"{adapter.mac or 'none yet'} ({'static' if adapter.is_static else 'dynamic'})"
    switch = adapter.switch_name or adapter.switch_id or "-"
    features = ", ".join(_feature(one) for one in adapter.features) or "-"
    return [adapter.name, mac, switch if adapter.is_connected else "-", features]


def _feature(feature: Feature) -> str:
    return f"{feature.name or feature.id}: {feature.data.hex()}"
