# SPDX-License-Identifier: Apache-2.0
"""Does a night boot? It is started from the repository, watched, and thrown away.

    lease -> a state home and a runtime folder of its own -> an empty image on each of the night's -> start -> off

Decides what of the definition the trial has, and what counts as booting. It has the night's disks, ids and firmware,
since a guest may refuse to start without them; its adapters are on a private switch that nothing else is on, its
drives are empty, it boots from disks alone, and nothing else of this host is given to it (`INV-IMPORT-CONFINED`). It
writes to images of its own. Other commands never see it, because it is in another state home.

A guest boots if its agent answers; or, as the user asks, if its serial console shows a text, or its screen changes
again and again after the firmware has had its time. A machine that goes off, or does not do so in time, has failed.
What a killed trial leaves is ended by the next one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vhdkit import backups
from vmm.api.manager import Manager
from vmm.api.restoring.found_night import FoundNight, found_night
from vmm.api.restoring.restoring import vmm_errors
from vmm.model import paths, unfinished
from vmm.model.errors import VmmError, of_os_error
from vmm.model.paths import MachinePaths, make_folders, write_whole
from vmm.model.spec import AutomaticSpec, DiskSpec, MachineSpec, PathsSpec
from vmm.model.waiting import looks
from vmm.net import switches
from vmm.net.switch_spec import make_switch
from vmm.processes.rpc import Progress
from vmm.store import registry
from vmm.store.state import MachineState, note_unclean

TRIAL_SECONDS = 300.0
_LOOK_SECONDS = 0.5  # a look asks the worker and takes a picture
FIRMWARE_SECONDS = 20.0  # what the screen shows before is the firmware's, which also fails with several pictures
_CHANGES = 3  # of the picture after that
_SWITCH = "trial"
_RUNTIME_NOTE = "runtime-folder"
_MAX_PATH_BYTES = 4096
Sign = Literal["heartbeat", "text", "screen"]


@dataclass(frozen=True, slots=True)
class TrialWish:
    """What counts as booting: the agent's heartbeat; with `expect` only that text on the serial console; with
    `screen` also a picture that changes.
    """

    expect: str | None = None
    screen: bool = False
    seconds: float = TRIAL_SECONDS


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
    repository: str, word: str, wish: TrialWish = TrialWish(), *, progress: Progress | None = None
) -> TrialReport:
    """Start a night, NAME, NAME@NIGHT or NAME@TIME, and see whether it boots. The repository is only read.

    Raises NotFound, StoreFailed for a night that cannot be opened, QemuFailed if it cannot be started, NoSpace.
    """
    end_abandoned()
    with vmm_errors(), found_night(repository, word) as found, _home(found.document.spec.name) as manager:
        name = found.document.spec.name
        show = progress or (lambda document: None)
        show({"step": f"{name}@{found.manifest.night}: starting"})
        with manager.folders.used():
            spec = _made(found, os.path.join(paths.home(), "disks"))
            registry.add(spec, fill=lambda machine: _fill(machine, found))
        begin = time.monotonic()
        manager.start(name, progress=progress)
        show({"step": f"{name}@{found.manifest.night}: waiting for a sign of life"})
        seen, words = watch(manager, name, wish)
        return TrialReport(name, found.manifest.night, seen, words, round(time.monotonic() - begin, 1))


# -- the machine ----------------------------------------------------------------------------------------------------


def _made(found: FoundNight, folder: str) -> MachineSpec:
    """The definition of the trial, with an image in `folder` on each of the night's."""
    spec = found.document.spec
    make_folders(folder)
    switch = None
    if any(one.switch is not None for one in spec.adapters):
        switches.create(make_switch(name=_SWITCH))
        switch = _SWITCH
    alone = {"switch": switch, "spoofing": False, "mirror": "none"}
    return spec.changed(
        disks=[made for disk in spec.disks if (made := _disk(found, disk, folder)) is not None],
        adapters=[one.model_copy(update=alone) for one in spec.adapters],
        automatic=AutomaticSpec(),
        paths=PathsSpec(),
        boot_order=[one for one in spec.boot_order if one == "disk"],
        background_capture=False,
        kernel=None,
        initrd=None,
        append=None,
    )


def _disk(found: FoundNight, disk: DiskSpec, folder: str) -> DiskSpec | None:
    """A disk of the trial: an image of its own, or an empty drive; None for what is not in the night."""
    record = found.saved_disks.get(disk.id)
    if record is None:
        return disk.model_copy(update={"path": None, "identity": None}) if disk.kind == "iso" else None
    kind = "vhdx" if record.image.name.endswith("vhdx") else "vhd"
    path = os.path.join(folder, f"{disk.id}.{kind}")
    standing = backups.stand_on_night(found.machine, found.manifest, disk.id, path)
    return disk.model_copy(
        update={"path": os.path.realpath(path), "format": kind, "parent_dirs": standing.folders, "read_only": False}
    )


def _fill(machine: MachinePaths, found: FoundNight) -> None:
    if found.manifest.consistency is not backups.Consistency.OFF_CLEAN:
        note_unclean(machine)
    if found.variables is not None:
        write_whole(machine.uefi_variables, found.variables)


# -- watching -------------------------------------------------------------------------------------------------------


def watch(manager: Manager, name: str, wish: TrialWish) -> tuple[Sign | None, str]:
    """Wait for a sign that the guest has booted. Returns which one it was, and what was seen in words."""
    pictures: list[int] = []
    begin = time.monotonic()
    last = "nothing was seen of the guest"
    for _ in looks(wish.seconds, every_seconds=_LOOK_SECONDS):
        info = manager.show(name)
        if info.state not in (MachineState.RUNNING, MachineState.STARTING):
            reason = f": {info.reason}" if info.reason else ""
            state = "unknown" if info.state is None else info.state.value
            return None, f"the machine is {state}{reason}; {last}"
        if wish.expect is not None:
            if wish.expect.encode() in manager.guest(name).console_log():
                return "text", f"its console shows {wish.expect!r}"
            last = f"its console does not show {wish.expect!r}"
            continue
        if info.heartbeat == "ok":
            return "heartbeat", "its agent answers"
        last = "its agent does not answer"
        if wish.screen and time.monotonic() - begin >= FIRMWARE_SECONDS:
            _note_picture(manager, name, pictures)
            if len(pictures) > _CHANGES:
                return "screen", f"its screen has changed {_CHANGES} times"
            last += f", and its screen has changed {len(pictures) - 1} times after the firmware"
    return None, f"{last} within {wish.seconds:.0f} s"


def _note_picture(manager: Manager, name: str, pictures: list[int]) -> None:
    """Add the picture on the screen if it is another one than the last."""
    with contextlib.suppress(VmmError):  # it has no screen, or not yet
        picture = hash(manager.guest(name).screen())
        if picture not in pictures[-1:]:
            pictures.append(picture)


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
