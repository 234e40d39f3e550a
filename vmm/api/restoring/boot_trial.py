# SPDX-License-Identifier: Apache-2.0
"""Does a night boot? It is started from the repository, watched, and thrown away.

    lease -> a state home and a runtime folder of its own -> an empty image on each of the night's -> start -> off

Decides what of the definition the trial has; what counts as booting is decided in `signs`. It has the night's disks,
ids and firmware, since a guest may refuse to start without them; its adapters are on a private switch that nothing
else is on, its drives are empty, it boots from disks alone, and nothing else of this host is given to it
(`INV-IMPORT-CONFINED`). It writes to images of its own. Other commands never see it, because it is in another state
home.

If its screen is to be judged, the same machine runs first with empty disks: what it shows then is its firmware's. What
a killed trial leaves is ended by the next one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vhdkit import backups, create_image
from vmm.api.manager import Manager
from vmm.api.restoring.found_night import FoundNight, found_night
from vmm.api.restoring.restoring import vmm_errors
from vmm.api.restoring.signs import Shown, Sign, TrialWish, firmware_pictures, watch
from vmm.model import paths, unfinished
from vmm.model.errors import VmmError, of_os_error
from vmm.model.paths import MachinePaths, make_folders, write_whole
from vmm.model.spec import AutomaticSpec, DiskSpec, MachineSpec, PathsSpec
from vmm.net import switches
from vmm.net.switch_spec import make_switch
from vmm.processes.rpc import Progress
from vmm.store import registry
from vmm.store.state import note_unclean

_SWITCH = "trial"
_RUNTIME_NOTE = "runtime-folder"
_MAX_PATH_BYTES = 4096
_BY_HEARTBEAT = TrialWish()
_EMPTY_BYTES = 1 << 20  # of a disk with nothing on it; to SeaBIOS less is a floppy


@dataclass(frozen=True, slots=True)
class TrialReport:
    """What a trial found. `seen`: the sign by which the guest has booted, None if it has not; `words` say more."""

    machine: str
    night: int
    seen: Sign | None
    words: str
    seconds: float

    @property
    def is_good(self) -> bool:
        """True if the night boots."""
        return self.seen is not None


def try_boot(
    repository: str, word: str, wish: TrialWish = _BY_HEARTBEAT, *, progress: Progress | None = None
) -> TrialReport:
    """Start a night, NAME, NAME@NIGHT or NAME@TIME, and see whether it boots. The repository is only read.

    Raises NotFound, StoreFailed for a night that cannot be opened, QemuFailed if it cannot be started, NoSpace.
    """
    end_abandoned()
    show = progress or (lambda document: None)
    with vmm_errors(), found_night(repository, word) as found:
        name, night = found.document.spec.name, found.manifest.night
        shown, has_screen = Shown(), found.document.spec.screen
        if wish.screen and wish.expect is None and has_screen:
            show({"step": f"{name}@{night}: what its firmware shows with empty disks"})
            with _started(found, progress, is_empty=True) as manager:
                shown = firmware_pictures(manager, name)
        show({"step": f"{name}@{night}: starting"})
        begin = time.monotonic()
        with _started(found, progress) as manager:
            show({"step": f"{name}@{night}: waiting for a sign of life"})
            seen, words = watch(manager, name, replace(wish, screen=wish.screen and has_screen), shown)
            words += ", and it has no screen" if wish.screen and not has_screen and seen is None else ""
            return TrialReport(name, night, seen, words, round(time.monotonic() - begin, 1))


# -- the machine ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _started(found: FoundNight, progress: Progress | None, *, is_empty: bool = False) -> Iterator[Manager]:
    """The machine runs until the block ends; then nothing of it is left."""
    name = found.document.spec.name
    with _home(name) as manager:
        with manager.folders.used():
            spec = _made(found, os.path.join(paths.home(), "disks"), is_empty=is_empty)
            registry.add(spec, fill=lambda machine: _fill(machine, found))
        manager.start(name, progress=progress)
        yield manager


def _made(found: FoundNight, folder: str, *, is_empty: bool) -> MachineSpec:
    """The definition of the trial, with an image in `folder` on each of the night's, or on nothing."""
    spec = found.document.spec
    make_folders(folder)
    switch = None
    if any(one.switch is not None for one in spec.adapters):
        switches.create(make_switch(name=_SWITCH))
        switch = _SWITCH
    alone = {"switch": switch, "spoofing": False, "mirror": "none"}
    return spec.changed(
        disks=[made for disk in spec.disks if (made := _disk(found, disk, folder, is_empty=is_empty)) is not None],
        adapters=[one.model_copy(update=alone) for one in spec.adapters],
        automatic=AutomaticSpec(),
        paths=PathsSpec(),
        boot_order=[one for one in spec.boot_order if one == "disk"],
        background_capture=False,
        kernel=None,
        initrd=None,
        append=None,
    )


def _disk(found: FoundNight, disk: DiskSpec, folder: str, *, is_empty: bool) -> DiskSpec | None:
    """A disk of the trial: an image of its own, or an empty drive; None for what is not in the night."""
    record = found.saved_disks.get(disk.id)
    if record is None:
        return disk.model_copy(update={"path": None, "identity": None}) if disk.kind == "iso" else None
    kind = "vhdx" if record.image.name.endswith("vhdx") else "vhd"
    path = os.path.join(folder, f"{disk.id}.{kind}")
    parents: tuple[str, ...] = ()
    if is_empty:
        create_image(path, _EMPTY_BYTES, disk_format="vhdx" if kind == "vhdx" else "dynamic")
    else:
        parents = backups.stand_on_night(found.machine, found.manifest, disk.id, path).folders
    return disk.model_copy(
        update={"path": os.path.realpath(path), "format": kind, "parent_dirs": parents, "read_only": False}
    )


def _fill(machine: MachinePaths, found: FoundNight) -> None:
    if found.manifest.consistency is not backups.Consistency.OFF_CLEAN:
        note_unclean(machine)
    if found.variables is not None:
        write_whole(machine.uefi_variables, found.variables)


# -- a state home of its own ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _home(name: str) -> Iterator[Manager]:
    """A manager with a state home and a runtime folder that nothing else uses, until the block ends."""
    above = _trials()
    folder = unfinished.folder_of(os.path.join(above, name))
    runtime = f"{paths.runtime_home()}-t{os.urandom(4).hex()}"
    try:
        make_folders(above)
        os.mkdir(folder, 0o700)
        write_whole(os.path.join(folder, _RUNTIME_NOTE), os.fsencode(runtime))
    except OSError as error:
        raise of_os_error(error, "make a folder for the trial", path=folder) from error
    try:
        yield Manager(home=folder, runtime=runtime)
    finally:
        _end(folder, runtime)


def _trials() -> str:
    return os.path.join(paths.home(), "trials")


def _end(folder: str, runtime: str) -> None:
    """End everything of a trial, and remove it. What cannot be ended is left for the next trial."""
    manager = Manager(home=folder, runtime=runtime)
    with contextlib.suppress(VmmError):
        for name in manager.names():
            with contextlib.suppress(VmmError):
                manager.stop(name)
        with manager.folders.used():
            for name in switches.names():
                switches.delete(name, force=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)


def end_abandoned() -> None:
    """End the trials whose command was killed."""
    for folder in unfinished.abandoned(_trials()):
        with contextlib.suppress(OSError):
            with open(os.path.join(folder, _RUNTIME_NOTE), "rb") as file:
                runtime = os.fsdecode(file.read(_MAX_PATH_BYTES))
            _end(folder, runtime)
