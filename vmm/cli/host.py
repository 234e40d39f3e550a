# SPDX-License-Identifier: Apache-2.0
"""`vmm host`: properties of this host, its disks, its default folders, and autostart of machines.

Decides how this is shown. Every verb has `--json`, whose documents are the library's facts under their own names.
Modules that only one verb needs are imported in that verb, because `vmm start` imports this module, too.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from vmm.cli.common import VerbGroup, epilog, format_size, print_json, print_line, print_pairs, print_table
from vmm.model.errors import InvalidSpec, NotFound, VmmError, printable, to_document

if TYPE_CHECKING:
    from vmm.host.block import BlockDevice, HostDevices
    from vmm.kvm.passthrough import Given

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_STYLES = {"ok": "green", "limited": "yellow", "missing": "red"}


@click.group("host", cls=VerbGroup)
def host_group() -> None:
    """This host: its properties, what it lacks, its disks and folders, and what starts with it."""


# -- info ---------------------------------------------------------------------------------------------------------


@host_group.command("info", epilog=epilog("vmm host info"))
@click.option("--refresh", is_flag=True, help="Test the accelerator again instead of using the remembered result.")
@_json_option
def info_command(refresh: bool, as_json: bool) -> None:
    """Show processors, memory, QEMU, features, and the accelerator with the proof that it runs a guest."""
    from vmm.api import doctor
    from vmm.host import info

    facts = info.gather()
    checks = doctor.examine()
    accelerator, problem = _accelerator(refresh)
    features = {check.key: check.state.value for check in checks}
    if as_json:
        print_json({"host": asdict(facts), "accelerator": accelerator, "problem": problem, "features": features})
        return
    memory = "not known" if facts.memory_bytes is None else format_size(facts.memory_bytes)
    if facts.available_bytes is not None:
        memory += f", {format_size(facts.available_bytes)} available"
    processor = f"{facts.processor_count} × {facts.processor or facts.architecture}"
    processor += f", {facts.virtualization}" if facts.virtualization else ""
    qemu = next(check for check in checks if check.key == "qemu")
    pairs = [
        ("host", f"{facts.name}, {facts.system or 'Linux'}{', itself a virtual machine' if facts.is_guest else ''}"),
        ("kernel", f"{facts.kernel} {facts.architecture}"),
        ("processors", processor),
        ("memory", memory),
        ("QEMU", qemu.found),
        ("accelerator", "none" if accelerator is None else str(accelerator["name"])),
    ]
    if accelerator is not None:
        pairs.append(("proof", str(accelerator["proof"])))
        if accelerator["problem"]:
            pairs.append(("but", str(accelerator["problem"])))
    elif problem:
        pairs.append(("because", problem))
    for state, title in (("ok", "found"), ("limited", "limited"), ("missing", "missing")):
        names = [check.title for check in checks if check.state == state and check.key not in ("qemu", "kvm")]
        if names:
            pairs.append((title, ", ".join(names)))
    print_pairs(pairs)
    if any(check.state != "ok" for check in checks):
        click.echo("vmm host doctor shows what is limited or missing, and how to fix it")


def _accelerator(refresh: bool) -> tuple[dict[str, Any] | None, str | None]:
    from vmm.api import doctor
    from vmm.kvm import accel

    try:
        return asdict(accel.probe(cache_folder=doctor.cache_folder(), refresh=refresh)), None
    except VmmError as error:
        return None, str(error)


# -- doctor -------------------------------------------------------------------------------------------------------


@host_group.command("doctor", epilog=epilog("vmm host doctor", "vmm host doctor --all"))
@click.option("--all", "show_all", is_flag=True, help="Show passed checks, too.")
@_json_option
def doctor_command(show_all: bool, as_json: bool) -> None:
    """Show what this host lacks, what does not work without it, and the command that installs it.

    Exits with 1 if no machine can run on this host.
    """
    from vmm.api import doctor

    checks = doctor.examine()
    able = doctor.is_able(checks)
    if as_json:
        print_json({"able": able, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            if show_all or check.state is not doctor.State.OK:
                click.echo(click.style(f"{check.state.value:8}", fg=_STYLES[check.state]), nl=False)
                click.echo(f"{check.title}: {printable(check.found)}")
                if check.without:
                    click.echo(f"{'':8}without it: {check.without}")
                if check.remedy:
                    click.echo(f"{'':8}remedy: {printable(check.remedy)}")
        well = sum(check.state is doctor.State.OK for check in checks)
        end = "machines can run on this host" if able else "no machine can run on this host"
        click.echo(f"{well} of {len(checks)} checks passed; {end}")
    if not able:
        raise SystemExit(1)


# -- disks --------------------------------------------------------------------------------------------------------


@host_group.command("disks", epilog=epilog("vmm host disks"))
@click.option("--all", "show_all", is_flag=True, help="Show empty drives and loop devices without a file, too.")
@_json_option
def disks_command(show_all: bool, as_json: bool) -> None:
    """List all block devices: size, model, identity, DAS or SAN, users, and whether it can be passed through."""
    from vmm.host.block import HostDevices

    host = HostDevices()
    devices = [one for one in host.devices() if show_all or one.is_present]
    given = _given()
    reasons = {one.name: _reasons(host, one, given) for one in devices}
    if as_json:
        print_json(
            [{**asdict(one), "pass_through": not reasons[one.name], "because": reasons[one.name]} for one in devices]
        )
        return
    if not devices:
        click.echo("no block devices found")
        return
    rows = [
        (
            ("  " if one.parent else "") + one.path,
            format_size(one.size_bytes),
            _attached(one),
            one.model or one.file or "",
            one.identity or "",
            ", ".join(_used_by(host, one)),
            "yes" if not reasons[one.name] else "no: it " + "; ".join(reasons[one.name]),
        )
        for one in devices
    ]
    print_table(("DEVICE", "SIZE", "ATTACHED", "MODEL", "IDENTITY", "USED BY", "PASS-THROUGH"), rows)


def _attached(device: BlockDevice) -> str:
    if device.transport is None:
        return " ".join(filter(None, (device.attachment, device.kind)))
    return f"{device.attachment} {device.transport}"


def _used_by(host: HostDevices, device: BlockDevice) -> list[str]:
    users = list(device.mounts) + (["swap"] if device.is_swap else [])
    for name in device.holders:
        try:
            users.append(host.device(name).path)
        except NotFound:
            users.append(name)
    return users


def _given() -> Given:
    """The devices that machines already have. A machine that cannot be read, or storage that does not answer, must not
    prevent the list, so image files are looked up by name.
    """
    from vmm.kvm.passthrough import given_of
    from vmm.store import registry

    try:
        machines, _ = registry.load_all()
    except VmmError:
        machines = []
    return given_of((machine.spec for machine in machines), follow_links=False)


def _reasons(host: HostDevices, device: BlockDevice, given: Given) -> list[str]:
    from vmm.kvm import passthrough

    read_only = device.read_only  # a write-protected device can be passed through for reading
    facts = passthrough.facts_of(device, host)
    return [str(one) for one in passthrough.refusals(facts, read_only=read_only, given=given)]


# -- paths --------------------------------------------------------------------------------------------------------


@host_group.group("paths", cls=VerbGroup, invoke_without_command=True)
@_json_option
@click.pass_context
def paths_group(context: click.Context, as_json: bool) -> None:
    """Show the default folders of new machines, disks and snapshots, and how to change them."""
    if context.invoked_subcommand is None:
        _show_paths(as_json)


def _show_paths(as_json: bool) -> None:
    from vmm.model import paths

    folders = paths.default_folders()
    places = {"home": paths.home(), "runtime": paths.runtime_home(), **folders}
    if as_json:
        print_json(places)
        return
    print_pairs(
        [(key, path if os.path.isdir(path) else f"{path} (does not exist yet)") for key, path in places.items()]
    )


@paths_group.command("set", epilog=epilog("vmm host paths set disks /srv/disks", "vmm host paths set disks --default"))
@click.argument("key")
@click.argument("folder", required=False)
@click.option("--default", "reset", is_flag=True, help="Use the built-in default folder again.")
@_json_option
def set_path_command(key: str, folder: str | None, reset: bool, as_json: bool) -> None:
    """Put new machines, disks or snapshots (KEY) into FOLDER. Existing ones stay where they are."""
    from vmm.model import paths

    if reset == (folder is not None):
        raise InvalidSpec("give a folder, or --default", hint=f"vmm host paths set {key} FOLDER")
    paths.set_default_folder(key, folder)
    _show_paths(as_json)


# -- autostart ----------------------------------------------------------------------------------------------------


@host_group.command(
    "autostart", epilog=epilog("vmm host autostart", "vmm host autostart --print", "vmm host autostart --remove")
)
@click.option("--remove", "action", flag_value="remove", help="Remove the unit.")
@click.option("--print", "action", flag_value="print", help="Only print the unit.")
@click.option(
    "--start-machines",
    "action",
    flag_value="start",
    help="Start the machines; the unit does this when the host starts.",
)
@click.option(
    "--stop-machines", "action", flag_value="stop", help="Stop the machines; the unit does this when the host stops."
)
@click.option("--user/--system", "for_user", default=None, help="For your user, or for the host (root only).")
@_json_option
def autostart_command(action: str | None, for_user: bool | None, as_json: bool) -> None:
    """Start and stop machines with this host, each according to its automatic actions.

    Installs a systemd unit: for the host if you are root, otherwise for your own service manager.
    """
    from vmm.host import autostart, systemd

    scope = systemd.default_scope() if for_user is None else "user" if for_user else "system"
    if action in ("start", "stop"):
        _run_automatic(action, as_json=as_json)
        return
    if action == "print":
        click.echo(autostart.unit_text(scope, own_command(), systemd.kept_environment()), nl=False)
        return
    if action == "remove":
        result = autostart.remove(scope)
        done = "removed" if result.changed else "was not installed:"
    else:
        result = autostart.install(scope, own_command())
        done = "installed" if result.changed else "was already installed:"
    if as_json:
        print_json(asdict(result))
        return
    click.echo(f"{done} {result.path}")
    for note in result.notes:
        click.echo(f"note: {note}")


def _run_automatic(action: str, *, as_json: bool) -> None:
    from vmm.api.automatic import AutomaticResult, start_machines, stop_machines
    from vmm.api.manager import Manager

    def tell(outcome: AutomaticResult) -> None:
        if not as_json:
            print_line(f"{outcome.machine}: {outcome.problem or outcome.done}")

    run = start_machines if action == "start" else stop_machines
    outcomes = run(Manager(), tell=tell)
    if as_json:
        print_json(
            [
                {
                    "machine": one.machine,
                    "done": one.done,
                    "error": None if one.problem is None else to_document(one.problem),
                }
                for one in outcomes
            ]
        )
    if any(one.problem is not None for one in outcomes):
        raise SystemExit(1)


def own_command() -> list[str]:
    """The full path of this command."""
    beside = os.path.join(os.path.dirname(sys.executable), "vmm")
    called = os.path.abspath(sys.argv[0])
    for path in (called if os.path.basename(called) == "vmm" else "", beside, shutil.which("vmm") or ""):
        if path and os.access(path, os.X_OK) and os.path.isfile(path):
            return [os.path.abspath(path)]
    raise NotFound("the command vmm is not installed", hint="pip install 'vhdkit[vmm]'")
