# SPDX-License-Identifier: Apache-2.0
"""`start`, `shutdown`, `stop`, `reset`, `pause`, `resume`, `save`: changes of a machine's state.

Decides how these commands become calls. Imports only what a start needs, because imports take most of a start's time.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from vmm.cli.common import SECONDS, epilog, output_options, print_disconnected, print_json, print_line, progress_line

if TYPE_CHECKING:
    from vmm.api.manager import Manager


def _manager() -> Manager:
    from vmm.api.manager import Manager

    return Manager()


def _report(name: str, state: str, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({"name": name, "state": state})
    elif not quiet:
        print_line(f"{name} is {state}")


@click.command("start", epilog=epilog("vmm start web", "vmm start web --discard-saved"))
@click.argument("name")
@click.option("--discard-saved", is_flag=True, help="Discard the saved memory and boot, as after a power cut.")
@output_options
def start_command(name: str, discard_saved: bool, as_json: bool, quiet: bool) -> None:
    """Start the machine NAME. It keeps running after this command has ended, whatever happens to the terminal.

    A saved machine continues where it was saved. If that is not possible, the saved memory is kept and nothing is
    started. An adapter whose switch is gone is disconnected; it joins the next switch of that name.
    """
    from vmm.processes import worker_connection as contact

    with progress_line(shown=not quiet and not as_json) as progress:
        started = contact.start(name, discard_saved=discard_saved, progress=progress)
    if as_json:
        print_json({"name": name, **asdict(started)})
    elif not quiet:
        print_line(f"{name} is {started.state}")
        print_disconnected(started)


@click.command("shutdown", epilog=epilog("vmm shutdown web", "vmm shutdown web --timeout 300"))
@click.argument("name")
@click.option("--timeout", type=SECONDS, metavar="SECONDS", default=120.0, show_default=True,
              help="How long the guest may take.")  # fmt: skip
@click.option("--force", is_flag=True, help="Power the machine off if it has not shut down by then.")
@output_options
def shutdown_command(name: str, timeout: float, force: bool, as_json: bool, quiet: bool) -> None:
    """Have the guest of NAME shut down, by its agent or else by the power button, and wait until it is off."""
    from vmm.model.errors import TimedOut

    with progress_line(shown=not quiet and not as_json) as progress:
        manager = _manager()
        try:
            manager.shutdown(name, timeout_seconds=timeout, progress=progress)
        except TimedOut:
            if not force:
                raise
            manager.stop(name, progress=progress)
    _report(name, "off", as_json=as_json, quiet=quiet)


@click.command("stop", epilog=epilog("vmm stop web"))
@click.argument("name")
@output_options
def stop_command(name: str, as_json: bool, quiet: bool) -> None:
    """Power NAME off, without asking the guest. What the guest had flushed to its disks is kept."""
    with progress_line(shown=not quiet and not as_json) as progress:
        _manager().stop(name, progress=progress)
    _report(name, "off", as_json=as_json, quiet=quiet)


@click.command("save", epilog=epilog("vmm save web"))
@click.argument("name")
@output_options
def save_command(name: str, as_json: bool, quiet: bool) -> None:
    """Save memory and devices of NAME to disk and switch it off; `vmm start` continues from there.

    If it cannot be saved, for instance for lack of space, the machine keeps running.
    """
    with progress_line(shown=not quiet and not as_json) as progress:
        _manager().save(name, progress=progress)
    _report(name, "saved", as_json=as_json, quiet=quiet)


@click.command("reset", epilog=epilog("vmm reset web"))
@click.argument("name")
@output_options
def reset_command(name: str, as_json: bool, quiet: bool) -> None:
    """Press the reset button of NAME."""
    manager = _manager()
    manager.reset(name)
    _report(name, manager.state(name), as_json=as_json, quiet=quiet)


@click.command("pause", epilog=epilog("vmm pause web"))
@click.argument("name")
@output_options
def pause_command(name: str, as_json: bool, quiet: bool) -> None:
    """Pause NAME: the guest stops running, and its memory stays as it is."""
    _manager().pause(name)
    _report(name, "paused", as_json=as_json, quiet=quiet)


@click.command("resume", epilog=epilog("vmm resume web"))
@click.argument("name")
@output_options
def resume_command(name: str, as_json: bool, quiet: bool) -> None:
    """Resume NAME after a pause."""
    _manager().resume(name)
    _report(name, "running", as_json=as_json, quiet=quiet)
