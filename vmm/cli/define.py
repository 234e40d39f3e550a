# SPDX-License-Identifier: Apache-2.0
"""`create`, `set` and `delete`: which machines exist and what they are made of.

Decides how options become settings. Which settings are valid is decided in `spec`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, get_args

import click

from vmm.api.manager import Manager
from vmm.cli.common import SIZE, confirm, epilog, format_size, output_options, print_json, print_line
from vmm.cli.disk import parse_disk
from vmm.cli.nic_words import parse_nic
from vmm.cli.show import document_of
from vmm.model.spec import AutomaticSpec, BootDevice, IntegrationSpec, MachineSpec
from vmm.store.state import MachineState

_SERVICES = tuple(name.replace("_", "-") for name in IntegrationSpec.model_fields)
_SET_HELP = {
    "memory": "Memory, such as 512M or 4G.",
    "cpus": "Number of virtual processors.",
    "firmware": "Firmware: bios (SeaBIOS) or uefi (OVMF).",
    "boot_order": "Order of boot devices, such as cdrom,disk,network.",
    "accel": "kvm, tcg, or auto: KVM if it really runs a guest.",
    "cpu_model": "QEMU's name for the processor model, which the machine keeps permanently.",
}


def _choices(model: Any, name: str) -> list[str]:
    return list(get_args(model.model_fields[name].annotation))


def _setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `create` and `set` share."""
    options = [
        click.option("--memory", type=SIZE, help=_SET_HELP["memory"]),
        click.option("--cpus", type=int, help=_SET_HELP["cpus"]),
        click.option("--firmware", type=click.Choice(["bios", "uefi"]), help=_SET_HELP["firmware"]),
        click.option("--boot-order", metavar="DEVICES", help=_SET_HELP["boot_order"]),
        click.option("--kernel", metavar="FILE", help="Boot this Linux kernel instead of a disk; '' for none."),
        click.option("--initrd", metavar="FILE", help="Initial RAM disk for the kernel."),
        click.option("--append", metavar="TEXT", help="Command line of the kernel."),
        click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), help=_SET_HELP["accel"]),
        click.option("--cpu", "cpu_model", metavar="MODEL", help=_SET_HELP["cpu_model"]),
        click.option("--screen/--no-screen", default=None, help="Whether the machine has a screen (VGA)."),
        click.option("--rtc", type=click.Choice(_choices(MachineSpec, "rtc")),
                     help="Time shown by the machine's clock at start: utc, or local, as Windows expects."),
        click.option("--service", "services", metavar="NAME=on|off", multiple=True,
                     help=f"Turn an integration service on or off: {', '.join(_SERVICES)}. Repeatable."),
        click.option("--automatic-start", type=click.Choice(_choices(AutomaticSpec, "start")),
                     help="What happens when the host starts."),
        click.option("--start-delay", type=int, metavar="SECONDS", help="Seconds to wait before the machine starts."),
        click.option("--automatic-stop", type=click.Choice(_choices(AutomaticSpec, "stop")),
                     help="What happens when the host stops."),
        click.option("--automatic-recovery", type=click.Choice(_choices(AutomaticSpec, "recovery")),
                     help="What happens when QEMU crashes."),
        click.option("--disk-folder", metavar="DIR", help="Folder to look for this machine's disks in; '' for none."),
        click.option("--snapshot-folder", metavar="DIR", help="Folder for this machine's snapshots; '' for none."),
        click.option("--background-capture/--no-background-capture", default=None,
                     help="Give QEMU what it needs to save memory while the guest runs: nothing with "
                          "vm.unprivileged_userfaultfd=1, /dev/userfaultfd for QEMU 8 and newer, else CAP_SYS_PTRACE, "
                          "which would give a guest that escapes from QEMU power over the host's processes."),
        click.option("--notes", metavar="TEXT", help="Notes about the machine."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _settings(words: dict[str, Any], before: MachineSpec | None) -> dict[str, Any]:
    """The options that were given, as settings of a machine."""
    names = {"memory": "memory_bytes", "cpus": "cpu_count", "accel": "accelerator"}
    plain = ("memory", "cpus", "firmware", "accel", "cpu_model", "screen", "rtc", "background_capture", "notes")
    settings: dict[str, Any] = {names.get(one, one): words[one] for one in plain if words[one] is not None}
    for one in ("kernel", "initrd", "append"):
        if words[one] is not None:
            settings[one] = words[one] or None
    if words["boot_order"] is not None:
        settings["boot_order"] = _boot_order(words["boot_order"])
    if words["services"]:
        known = before.integration.model_dump() if before is not None else {}
        settings["integration"] = known | dict(_service(word) for word in words["services"])
    automatic = {
        "start": words["automatic_start"],
        "start_delay_seconds": words["start_delay"],
        "stop": words["automatic_stop"],
        "recovery": words["automatic_recovery"],
    }
    automatic = {name: value for name, value in automatic.items() if value is not None}
    if automatic:
        settings["automatic"] = (before.automatic.model_dump() if before is not None else {}) | automatic
    folders = {"disks": words["disk_folder"], "snapshots": words["snapshot_folder"]}
    folders = {name: value or None for name, value in folders.items() if value is not None}
    if folders:
        settings["paths"] = (before.paths.model_dump() if before is not None else {}) | folders
    return settings


def _boot_order(text: str) -> list[str]:
    order = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in order if word not in get_args(BootDevice)]
    if unknown:
        raise click.BadParameter(
            f"{unknown[0]!r} is unknown; the devices are {', '.join(get_args(BootDevice))}", param_hint="--boot-order"
        )
    return order


def _service(word: str) -> tuple[str, bool]:
    name, _, value = word.partition("=")
    name = name.replace("_", "-")
    if name not in _SERVICES or value not in ("on", "off"):
        raise click.BadParameter(
            f"{word!r} is not NAME=on|off; the services are {', '.join(_SERVICES)}", param_hint="--service"
        )
    return name.replace("-", "_"), value == "on"


@click.command(
    "create",
    epilog=epilog(
        "vmm create web --memory 1G --cpus 2 --disk web.vhd",
        "vmm create web --disk system.avhd --disk data.vhd --cdrom installer.iso",
        "vmm create tiny --kernel vmlinuz --initrd initrd.gz --append console=ttyS0",
    ),
)
@click.argument("name")
@click.option("--disk", "disks", metavar="IMAGE[,OPTION=VALUE...]", multiple=True,
              help="A disk; options: controller=ide|scsi|virtio, index=N, unit=N, serial=TEXT, read-only,"
                   " format=vhd|vhdx|raw, parent-dir=DIR, allow-raw-parent, cache=writeback|none."
                   " Repeatable; the first is on IDE.")  # fmt: skip
@click.option("--pass-through", "devices", metavar="DEVICE|iscsi://...", multiple=True,
              help="A whole block device or iSCSI LUN as a disk (on SCSI, or as ,controller= says).")  # fmt: skip
@click.option("--cdrom", "images", metavar="FILE[,OPTION=VALUE...]", multiple=True,
              help="An ISO image in a drive on IDE; '' for an empty drive. Options: index=N, unit=N, serial=TEXT."
                   " Repeatable.")  # fmt: skip
@click.option("--nic", "nics", metavar="SWITCH[,OPTION=VALUE...]", multiple=True,
              help="An adapter on a switch ('-' for none); options as for vmm nic add. Repeatable.")  # fmt: skip
@click.option(
    "--folder", metavar="DIR", help="Create the machine's folder in DIR instead of the host's default folder."
)
@_setting_options
@output_options
def create_command(
    name: str,
    disks: tuple[str, ...],
    devices: tuple[str, ...],
    images: tuple[str, ...],
    nics: tuple[str, ...],
    folder: str | None,
    as_json: bool,
    quiet: bool,
    **words: Any,
) -> None:
    """Define a machine called NAME. Nothing is started, and no disk is changed.

    Images are examined as the machine will open them. The machine permanently keeps QEMU's newest machine type and the
    processor model, so that saved states can be restored after an upgrade.
    """
    requests = [parse_disk(word) for word in disks]
    requests += [parse_disk(word, kind="pass-through") for word in devices]
    requests += [parse_disk(word, kind="iso") for word in images]
    adapters = [parse_nic(word) for word in nics]
    one = Manager().create(name, disks=requests, adapters=adapters, folder=folder, **_settings(words, None))
    if as_json:
        print_json(document_of(one))
    elif not quiet:
        assert one.spec is not None
        print_line(
            f"{name}: {one.spec.cpu_count} × {one.spec.cpu_model}, {format_size(one.spec.memory_bytes)},"
            f" disks: {len(one.spec.disks)}, adapters: {len(one.spec.adapters)}, {one.spec.machine_type}"
        )


@click.command("set", epilog=epilog("vmm set web --memory 2G", "vmm set web --automatic-stop shut-down --rename www"))
@click.argument("name")
@click.option("--rename", "new_name", metavar="NAME", help="Rename the machine.")
@click.option("--new-id", is_flag=True, help="Turn a copied machine folder into a separate machine: it gets a new id"
              " and new MAC addresses, and keeps the images that were copied with it, but not those that its"
              " original needs, nor the snapshots and saved memory.")  # fmt: skip
@_setting_options
@output_options
def set_command(name: str, new_name: str | None, new_id: bool, as_json: bool, quiet: bool, **words: Any) -> None:
    """Change settings of the machine NAME. A running machine gets new hardware at its next start.

    \b
    With --json: what `vmm show --json` prints, and
      takes_effect  "now" or "next start"
    """
    manager = Manager()
    if new_id:
        _new_id(manager, name, quiet=quiet or as_json)
    before = manager.show(name).spec
    settings = _settings(words, before)
    if new_name is not None:
        settings["name"] = new_name
    if not settings and not new_id:
        raise click.UsageError("name a setting to change")
    later = bool(settings) and manager.set(name, **settings)
    name = new_name or name
    if as_json:
        print_json({**document_of(manager.show(name)), "takes_effect": "next start" if later else "now"})
    elif not quiet:
        print_line(f"{name} is changed" + ("; this takes effect at its next start" if later else ""))
        if {"kernel", "initrd"} & set(settings) and manager.state(name) is MachineState.SAVED:
            print_line(f"{name}: its saved memory is restored unchanged; this takes effect when the guest restarts")


def _new_id(manager: Manager, name: str, *, quiet: bool) -> None:
    done = manager.new_id(name)
    if quiet:
        return
    print_line(f"{name} is now a machine separate from {done.original}: its id is {done.id}")
    for kept in done.disks:
        print_line(f"keeps    {kept.disk}: {kept.path}")
    for left in done.taken_out:
        print_line(f"leaves   {left.disk}: {left.path}  ({left.reason}; vmm disk add {name} with a copy of it)")
    if done.aside is not None:
        print_line(f"its snapshots and saved memory belong to {done.original} and were moved aside: {done.aside}")


@click.command("delete", epilog=epilog("vmm delete web", "vmm delete web --with-disks --yes"))
@click.argument("name")
@click.option("--with-disks", is_flag=True, help="Remove its own images, too; never a parent that belongs to others.")
@click.option("--with-snapshots", is_flag=True, help="Remove its snapshots, too; needed if it has any.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed, but remove nothing.")
@output_options
def delete_command(
    name: str, with_disks: bool, with_snapshots: bool, yes: bool, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Remove the machine NAME, with its saved memory and logs. Its disks stay, unless --with-disks is given.

    The files to be removed are listed first.
    """
    manager = Manager()
    plan = manager.plan_delete(name, with_disks=with_disks, with_snapshots=with_snapshots)
    document: dict[str, Any] = {"folder": plan.folder, "disks": list(plan.disks),
                "kept": [asdict(one) for one in plan.kept]}  # fmt: skip
    if not as_json and not quiet:
        for path in (plan.folder, *plan.disks):
            print_line(f"{'would remove' if dry_run else 'removes'}  {path}")
        for one in plan.kept:
            print_line(f"keeps    {one.path}  ({one.reason})")
    if not dry_run:
        confirm(f"Delete {name}?", yes=yes)
        done = manager.delete(name, with_disks=with_disks, with_snapshots=with_snapshots)
        document["kept"] = [asdict(one) for one in done.kept]
        document["disks"] = list(done.disks)
        if not as_json and not quiet:
            for one in sorted(set(done.kept) - set(plan.kept), key=lambda one: (one.path, one.reason)):
                print_line(f"keeps    {one.path}  ({one.reason})")
    if as_json:
        print_json({**document, "deleted": not dry_run})
    elif not quiet and not dry_run:
        print_line(f"{name} is deleted")
