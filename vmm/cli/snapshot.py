# SPDX-License-Identifier: Apache-2.0
"""`snapshot ...`: taking snapshots, going back to them, the tree, deleting, merging.

Decides how the tree is drawn and what is reported about a merge. Everything else is decided in `vmm.snapshots`.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from vmm.api.machine_snapshots import MODES, MachineSnapshots
from vmm.api.manager import Manager
from vmm.cli.common import (
    SIZE,
    VerbGroup,
    confirm,
    epilog,
    format_size,
    output_options,
    print_aside,
    print_disconnected,
    print_json,
    print_line,
    print_pairs,
    print_table,
    progress_line,
)
from vmm.processes import worker_connection as contact
from vmm.processes.answers import Started
from vmm.snapshots.steps import Tidied
from vmm.store.snapshots.tree import Snapshot, Tree, snapshot_document
from vmm.store.state import MachineState

_BRANCH, _LAST, _DOWN, _SPACE = "├─ ", "└─ ", "│  ", "   "
_PLAIN = str.maketrans("├└│─●○", "||| *o")


@click.group("snapshot", cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
def snapshot_command() -> None:
    """Take snapshots of a machine, running or not, and go back to them.

    A snapshot is given by its name, its id, or the beginning of its id.
    """


def _of(machine: str) -> MachineSnapshots:
    return Manager().snapshots(machine)


@snapshot_command.command(
    "create",
    epilog=epilog("vmm snapshot create web", 'vmm snapshot create web --name "before the update" --consistent'),
)
@click.argument("machine")
@click.option("--name", help="Name of the snapshot; by default the time.")
@click.option("--notes", default="", help="A text to store with it.")
@click.option("--consistent", is_flag=True, help="Have the agent freeze the guest's file systems meanwhile.")
@click.option("--mode", type=click.Choice(MODES), help="How memory is captured; by default the best possible way.")
@output_options
def create_command(
    machine: str, name: str | None, notes: str, consistent: bool, mode: str | None, as_json: bool, quiet: bool
) -> None:
    """Keep the present state of MACHINE: configuration, all disks and, if it is running, its memory.

    A running guest is paused for a moment, and continues while its memory is written. --mode background needs a host
    that allows it: see `vmm host doctor`. A machine with pass-through disks cannot have snapshots.
    """
    with progress_line(shown=not quiet and not as_json) as progress:
        snapshot = _of(machine).create(name, notes=notes, consistent=consistent, mode=mode, progress=progress)
    if as_json:
        print_json(snapshot_document(snapshot))
    elif not quiet:
        print_line(f"{machine}: {snapshot.name} ({snapshot.id[:8]}), {_memory_words(snapshot)}")


def _memory_words(snapshot: Snapshot) -> str:
    if snapshot.memory_bytes is None:
        return "disks and configuration"
    size = format_size(snapshot.memory_bytes)
    if not snapshot.pause_seconds:
        return f"with {size} of memory"
    return f"with {size} of memory; the guest was paused for {snapshot.pause_seconds * 1000:.0f} ms ({snapshot.mode})"


@snapshot_command.command("tree", epilog=epilog("vmm snapshot tree web"))
@click.argument("machine")
@output_options
def tree_command(machine: str, as_json: bool, quiet: bool) -> None:
    """Draw the snapshots of MACHINE, and where it is now. Sizes are what images and memory occupy on disk.

    The size of disks is that of the images that the snapshot froze: of what was written since the previous snapshot.
    """
    snapshots = _of(machine)
    tree = snapshots.tree()
    if as_json:
        print_json({"now": tree.now, "limit": tree.limit, "snapshots": _documents(snapshots, tree)})
        return
    if quiet:
        return
    rows: list[tuple[str, ...]] = []
    _draw(snapshots, tree, None, "", rows)
    plain = _is_plain()
    print_table(
        ("SNAPSHOT", "ID", "TAKEN", "DISKS", "MEMORY", "NOTES"),
        [(row[0].translate(_PLAIN) if plain else row[0], *row[1:]) for row in rows],
    )
    _tell_what_is_left(snapshots)


def _draw(
    snapshots: MachineSnapshots, tree: Tree, parent: str | None, indent: str, rows: list[tuple[str, ...]]
) -> None:
    children: list[Snapshot | None] = [*tree.children(parent)]
    if tree.now == parent:
        children.append(None)
    for number, one in enumerate(children):
        last = number == len(children) - 1
        mark = indent + (_LAST if last else _BRANCH)
        if one is None:
            rows.append((f"{mark}● now", "", "", format_size(snapshots.size_of_now()), "", ""))
            continue
        sizes = snapshots.sizes(one)
        taken = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.created))
        memory = format_size(sizes.memory_bytes) if one.memory_bytes is not None else "-"
        notes = one.notes.splitlines()[0] if one.notes else ""
        rows.append((f"{mark}○ {one.name}", one.id[:8], taken, format_size(sizes.disk_bytes), memory, notes))
        _draw(snapshots, tree, one.id, indent + (_SPACE if last else _DOWN), rows)


def _is_plain() -> bool:
    """True if the terminal's encoding cannot draw lines."""
    import sys

    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        "├●".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return True
    return False


def _tell_what_is_left(snapshots: MachineSnapshots) -> None:
    if (merging := snapshots.merging()) is not None:
        share = f" ({merging.done_bytes * 100 // merging.total_bytes} %)" if merging.total_bytes else ""
        print_line(f"images are being merged{share}")
        return
    if due := snapshots.merges_due():
        print_line(f"{due} merge{'s' if due > 1 else ''} waiting for the machine to be off")
    for path, reason in snapshots.hidden().items():
        print_line(f"kept without a snapshot: {path} ({reason})")
    for path, repositories in snapshots.kept_for_backups().items():
        print_line(f"kept for the next backup: {path} ({', '.join(repositories)})")


def _documents(snapshots: MachineSnapshots, tree: Tree) -> list[dict[str, Any]]:
    found = []
    for one in tree.snapshots.values():
        sizes = snapshots.sizes(one)
        found.append({**snapshot_document(one), "allocated_disk_bytes": sizes.disk_bytes,
                      "allocated_memory_bytes": sizes.memory_bytes})  # fmt: skip
    return found


@snapshot_command.command("list", epilog=epilog("vmm snapshot list web --json"))
@click.argument("machine")
@output_options
def list_command(machine: str, as_json: bool, quiet: bool) -> None:
    """List the snapshots of MACHINE, oldest first."""
    snapshots = _of(machine)
    tree = snapshots.tree()
    if as_json:
        print_json(_documents(snapshots, tree))
    elif not quiet:
        rows = []
        for one in sorted(tree.snapshots.values(), key=lambda one: one.created):
            taken = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.created))
            parent = tree.snapshots[one.parent].name if one.parent else "-"
            rows.append((one.id[:8], one.name, taken, one.taken_in, parent, "now" if tree.now == one.id else ""))
        if rows:
            print_table(("ID", "NAME", "TAKEN", "WHEN IT WAS", "CAME AFTER", ""), rows)
        else:
            print_aside(f"no snapshots: vmm snapshot create {machine}")


@snapshot_command.command("show", epilog=epilog('vmm snapshot show web "before the update"'))
@click.argument("machine")
@click.argument("snapshot")
@output_options
def show_command(machine: str, snapshot: str, as_json: bool, quiet: bool) -> None:
    """Show everything about SNAPSHOT of MACHINE."""
    snapshots = _of(machine)
    one = snapshots.find(snapshot)
    if as_json:
        [document] = [it for it in _documents(snapshots, snapshots.tree()) if it["id"] == one.id]
        print_json(document)
    elif not quiet:
        tree = snapshots.tree()
        print_pairs([
            ("name", one.name),
            ("id", one.id),
            ("taken", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.created))),
            ("the machine was", one.taken_in + (", file systems flushed" if one.consistent else "")),
            ("came after", tree.snapshots[one.parent].name if one.parent else ""),
            ("memory", "" if one.memory_bytes is None else format_size(one.memory_bytes)),
            ("stood still", f"{one.pause_seconds * 1000:.0f} ms ({one.mode})" if one.pause_seconds else ""),
            *((disk, path) for disk, path in one.disks.items()),
            ("folder", one.folder),
            ("notes", one.notes),
        ])  # fmt: skip


@snapshot_command.command(
    "apply",
    epilog=epilog(
        "vmm snapshot apply web clean --discard-current", "vmm snapshot apply web clean --snapshot-current --start"
    ),
)
@click.argument("machine")
@click.argument("snapshot")
@click.option("--discard-current", is_flag=True, help="Discard the present state.")
@click.option("--snapshot-current", is_flag=True, help="Keep the present state as a snapshot first.")
@click.option("--name", help="With --snapshot-current: name of that snapshot.")
@click.option("--start", is_flag=True, help="Start the machine afterwards.")
@output_options
def apply_command(
    machine: str,
    snapshot: str,
    discard_current: bool,
    snapshot_current: bool,
    name: str | None,
    start: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Return MACHINE to SNAPSHOT: configuration, disks and memory. A running machine is powered off first.

    A snapshot with memory leaves the machine saved, and `vmm start` continues from there; otherwise it is off.
    """
    if name is not None and not snapshot_current:
        raise click.UsageError("--name needs --snapshot-current")
    with progress_line(shown=not quiet and not as_json) as progress:
        applied = _of(machine).apply(
            snapshot, discard_current=discard_current, snapshot_current=name or snapshot_current, progress=progress
        )
        started = contact.start(machine, progress=progress) if start else Started(MachineState(applied.state))
    if as_json:
        print_json({"name": machine, "snapshot": applied.snapshot.id, **asdict(started)})
    elif not quiet:
        print_line(f"{machine} is at {applied.snapshot.name}, and {started.state}")
        print_disconnected(started)


@snapshot_command.command(
    "delete", epilog=epilog("vmm snapshot delete web old", "vmm snapshot delete web old --subtree")
)
@click.argument("machine")
@click.argument("snapshot")
@click.option("--subtree", is_flag=True, help="Delete all snapshots below it, too.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation of a subtree.")
@output_options
def delete_command(machine: str, snapshot: str, subtree: bool, yes: bool, as_json: bool, quiet: bool) -> None:
    """Delete SNAPSHOT of MACHINE, whatever the machine is doing. No other state changes.

    Its memory is removed at once. An image that no other builds on is removed at once, too. If one image builds on it,
    that one is merged into it when the machine is off, or by `vmm snapshot merge --live`; if several do, it stays
    until all but one are gone.
    """
    snapshots = _of(machine)
    one = snapshots.find(snapshot)
    if subtree:
        names = [it.name for it in snapshots.tree().subtree(one.id)]
        if len(names) > 1:
            confirm(f"Delete {len(names)} snapshots ({', '.join(names)})?", yes=yes)
    deleted = snapshots.delete(one.id, subtree=subtree)
    if as_json:
        print_json({
            "deleted": [it.id for it in deleted.snapshots], "removed": list(deleted.tidied.removed),
            "merges": deleted.tidied.merges, "kept": dict(deleted.tidied.kept),
        })  # fmt: skip
    elif not quiet:
        for it in deleted.snapshots:
            print_line(f"{machine}: {it.name} is deleted")
        _tell_tidied(deleted.tidied, Manager().state(machine).value)


def _tell_tidied(tidied: Tidied, state: str) -> None:
    for path in tidied.removed:
        print_line(f"removed  {path}")
    for path, reason in tidied.kept.items():
        print_line(f"keeps    {path} ({reason})")
    if tidied.merges:
        merges = f"{tidied.merges} merge{'s' if tidied.merges > 1 else ''}"
        print_line(f"{merges} in the background" if state == "off" else f"{merges} waiting until the machine is off")


@snapshot_command.command("rename", epilog=epilog("vmm snapshot rename web old new"))
@click.argument("machine")
@click.argument("snapshot")
@click.argument("name", required=False)
@click.option("--notes", help="New notes.")
@output_options
def rename_command(
    machine: str, snapshot: str, name: str | None, notes: str | None, as_json: bool, quiet: bool
) -> None:
    """Rename SNAPSHOT of MACHINE to NAME, or replace its notes."""
    if name is None and notes is None:
        raise click.UsageError("give a new name, --notes, or both")
    snapshots = _of(machine)
    one = snapshots.find(snapshot)
    if name is not None:
        snapshots.rename(one.id, name)
    if notes is not None:
        snapshots.annotate(one.id, notes)
    if as_json:
        print_json(snapshot_document(snapshots.find(one.id)))
    elif not quiet:
        print_line(f"{machine}: {snapshots.find(one.id).name}")


@snapshot_command.command("limit", epilog=epilog("vmm snapshot limit web 100"))
@click.argument("machine")
@click.argument("number", type=int)
@output_options
def limit_command(machine: str, number: int, as_json: bool, quiet: bool) -> None:
    """Limit MACHINE to NUMBER snapshots; the default is 50."""
    _of(machine).set_limit(number)
    if as_json:
        print_json({"name": machine, "limit": number})
    elif not quiet:
        print_line(f"{machine} may have {number} {'snapshot' if number == 1 else 'snapshots'}")


@snapshot_command.command("forget-memory", epilog=epilog("vmm snapshot forget-memory web old"))
@click.argument("machine")
@click.argument("snapshot")
@output_options
def forget_memory_command(machine: str, snapshot: str, as_json: bool, quiet: bool) -> None:
    """Remove the memory of SNAPSHOT of MACHINE and keep the rest: going back to it is then as after a power cut."""
    one = _of(machine).forget_memory(snapshot)
    if as_json:
        print_json(snapshot_document(one))
    elif not quiet:
        print_line(f"{machine}: the memory of {one.name} is removed")


@snapshot_command.command(
    "merge", epilog=epilog("vmm snapshot merge web", "vmm snapshot merge web --live --max-rate 50M")
)
@click.argument("machine")
@click.option("--live", is_flag=True, help="Merge while the machine runs.")
@click.option("--max-rate", type=SIZE, help="With --live: at most this many bytes a second.")
@click.option("--cancel", is_flag=True, help="Stop the merge in progress. Nothing is lost.")
@output_options
def merge_command(machine: str, live: bool, max_rate: int | None, cancel: bool, as_json: bool, quiet: bool) -> None:
    """Merge the images of MACHINE that deleted snapshots have left, and wait for the result.

    While the machine is off, this happens automatically in the background. --live merges while the guest runs: its
    writes are held only at the end, for a few milliseconds.
    """
    snapshots = _of(machine)
    if cancel:
        stopped = snapshots.cancel_merge()
        if as_json:
            print_json({"cancelled": stopped})
        elif not quiet:
            print_line(f"{machine}: the merge is stopped" if stopped else f"{machine}: nothing is being merged")
        return
    if max_rate is not None and not live:
        raise click.UsageError("--max-rate needs --live")
    if max_rate is not None and max_rate <= 0:
        raise click.UsageError("--max-rate must be more than 0")
    with progress_line(shown=not quiet and not as_json) as progress:
        if live:
            done = snapshots.merge_live(max_rate_bytes=max_rate, progress=progress)
            count = sum(one.problem is None for one in done)
        else:
            done, count = (), snapshots.merge(progress=progress)
    if as_json:
        merges = [{name: value for name, value in asdict(one).items() if value is not None} for one in done]
        print_json({"merged": count, "merges": merges})
    elif not quiet:
        print_line(f"{machine}: {count} merged" if done or count else f"{machine}: nothing to merge")
        for one in done:
            if one.held_seconds:
                print_line(f"into {one.target}: the guest's writes were held for {one.held_seconds * 1000:.0f} ms")
        for one in done:
            if one.problem is not None:
                print_line(f"not now: {one.problem}")


@snapshot_command.command("export", epilog=epilog("vmm snapshot export web clean /mnt/usb/web"))
@click.argument("machine")
@click.argument("snapshot")
@click.argument("folder", type=click.Path())
@click.option("--flat", is_flag=True, help="Write one image for each disk, without parents.")
@output_options
def export_command(machine: str, snapshot: str, folder: str, flat: bool, as_json: bool, quiet: bool) -> None:
    """Export MACHINE, as it was at SNAPSHOT, to the new FOLDER, whatever it is doing now. See `vmm export`."""
    from vmm.api.export_import.exporting import export
    from vmm.cli.transfer import report

    one = _of(machine).find(snapshot)
    with progress_line(shown=not quiet and not as_json) as progress:
        done = export(machine, folder, snapshot=one.id, flat=flat, progress=progress)
    report(done, f"{machine} at {one.name} is in {done.folder}", as_json=as_json, quiet=quiet)
