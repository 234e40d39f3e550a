# SPDX-License-Identifier: Apache-2.0
"""A night of a repository from which a machine is to be made: which one, and what its definition may have here.

Nothing in a repository is trusted. The definition is judged as that of an imported folder (`export_import.foreign`),
but what it names is kept if the user allows it by name, since most nights are restored on the host that they come
from. Creates nothing.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import vhdkit
from vhdkit import backups
from vmm.api.export_import.arrival import looked_at, refusal, resolved
from vmm.api.export_import.foreign import ALLOWANCES, SWITCH, Allowance, Consent, Judged, judge
from vmm.api.restoring.memory import problem_of
from vmm.model.errors import InvalidSpec, NotFound, store_error
from vmm.model.formats import ImageFormat
from vmm.model.paths import default_folders
from vmm.model.spec import MAX_SERIAL_CHARACTERS, MachineSpec
from vmm.store.machine_document import MachineDocument
from vmm.store.night_files import (
    DEFINITION,
    MAX_DEFINITION_BYTES,
    MAX_STATE_BYTES,
    MAX_VARIABLES_BYTES,
    MEMORY,
    MEMORY_STATE,
    UEFI_VARIABLES,
    read_night_definition,
)

ALL = "all"
ALLOWED: Mapping[Allowance, str] = {
    **ALLOWANCES,
    "memory": "the memory of the guest, a stream that QEMU reads when the machine is started",
}
NOTHING = Consent(by_name=True)
CONSISTENCY: Mapping[backups.Consistency, str] = {
    backups.Consistency.AGENT: "the guest's file systems were flushed and frozen",
    backups.Consistency.CRASH: "as after a power cut",
    backups.Consistency.OFF_CLEAN: "the machine had shut down",
    backups.Consistency.OFF_UNCLEAN: "the machine was off without having shut down: as after a power cut",
}


def consent_of(words: Sequence[str], paths: Mapping[str, str], switches: Mapping[str, str]) -> Consent:
    """What `--allow` words allow: one of `ALLOWED`, `switch:NAME`, a path of the definition, or `all`.

    `paths` and `switches` are what is replaced, as in `Consent`.
    """
    named = [word for word in words if word != ALL]
    allow = frozenset(word for word in named if word in ALLOWED)
    same = {(name := word.removeprefix(SWITCH)): name for word in named if word.startswith(SWITCH)}
    kept = {word: word for word in named if word not in allow and not word.startswith(SWITCH)}
    return Consent({**kept, **paths}, {**same, **switches}, allow, everything=ALL in words, by_name=True)


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """What the user asks for. `night` is NAME, NAME@NIGHT or NAME@TIME.

    `name`: of the new machine, None for the old one. With `register` it is the old machine: its id, addresses and
    serials. `folder`: where the folder of its disks is made. `consent`: what it may have besides its own files.
    Without `check` files are not compared with their sums. `without_memory`: why the memory of the night is left out,
    None if it is wanted.
    """

    repository: str
    night: str
    name: str | None = None
    register: bool = False
    folder: str | None = None
    consent: Consent = NOTHING
    check: bool = True
    without_memory: str | None = None


@dataclass(frozen=True, slots=True)
class FoundNight:
    """A night that is held: no prune takes it as long as `found_night` runs. `variables`: its UEFI variables;
    `memory_state`: the description of its memory, None if it has none.
    """

    machine: backups.MachineFolder
    manifest: backups.Manifest
    document: MachineDocument
    variables: bytes | None
    memory_state: bytes | None = None

    @property
    def saved_disks(self) -> dict[str, backups.DiskRecord]:
        """The records of the disks that the definition has an image of, by id."""
        return {one.disk_id: one for one in self.manifest.disks if one.disk_id in self.document.images}

    @property
    def word(self) -> str:
        """The night as `backups.restore` takes it, whatever is called so meanwhile."""
        return f"{self.machine.id}@{self.manifest.night}"


@contextlib.contextmanager
def found_night(repository: str, word: str, *, dry_run: bool = False) -> Iterator[FoundNight]:
    """The night that a word means, leased while the block runs unless `dry_run`.

    Raises StoreFailed, InUse while its machine is pruned, NotFound, InvalidSpec for a night of a disk alone.
    """
    with contextlib.ExitStack() as held:
        try:
            wanted = backups.Wanted.of_word(word)
            opened = held.enter_context(backups.open_repository(repository))
            machine = held.enter_context(opened.machine(opened.find_machine(wanted.machine)))
            live = [one.manifest for one in machine.nights() if one.manifest is not None and not one.manifest.dropped]
            number = backups.chosen(live, wanted.at, machine.name).night
            if dry_run:
                manifest = machine.require_night(number)
            else:
                backups.finish_interrupted(machine, wanted=number)
                manifest = held.enter_context(machine.reading(number, "vmm restore"))
            found = _read(machine, manifest)
        except vhdkit.VhdkitError as error:
            raise store_error(error) from error
        yield found


def _read(machine: backups.MachineFolder, manifest: backups.Manifest) -> FoundNight:
    names = {one.name for one in manifest.files}
    if DEFINITION not in names:
        raise NotFound(
            f"night {manifest.night} of {machine.name} has no definition of a machine: it is of a disk alone",
            path=machine.repository.path,
            hint=f"vhdkit restore {machine.repository.path} {machine.name}@{manifest.night} IMAGE, then: vmm create",
        )
    content = backups.read_file(machine, manifest, DEFINITION, MAX_DEFINITION_BYTES)
    document = read_night_definition(
        content, f"{DEFINITION} of {machine.name}@{manifest.night}", [one.disk_id for one in manifest.disks]
    )
    variables = None
    if UEFI_VARIABLES in names:
        variables = backups.read_file(machine, manifest, UEFI_VARIABLES, MAX_VARIABLES_BYTES)
    state = None
    if names.issuperset((MEMORY, MEMORY_STATE)):
        state = backups.read_file(machine, manifest, MEMORY_STATE, MAX_STATE_BYTES)
    return FoundNight(machine, manifest, document, variables, state)


# -- judging -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """The machine that will be made. `paths`: disk id -> the path of its image, in `folder`, which does not exist yet.

    `refused`: what the definition has from outside the night, and the option that allows it; with any, no machine is
    made. `granted`: what the user allowed. `has_memory`: it will continue from the night's memory; `memory_left_out`:
    why it does not, although the night has one.
    """

    spec: MachineSpec
    folder: str
    paths: Mapping[str, str]
    refused: Mapping[str, str]
    granted: tuple[str, ...]
    has_memory: bool = False
    memory_left_out: str | None = None


def plan_machine(found: FoundNight, request: RestoreRequest) -> Planned:
    """The machine that a request makes of a night. Raises InvalidSpec, NotFound for what the user names."""
    if request.folder is not None and not os.path.isdir(request.folder):
        raise InvalidSpec("is not a folder", path=request.folder, hint="create it first")
    spec = _identified(found.document.spec, request)
    consent = resolved(request.consent)
    if request.folder is not None and spec.paths.disks is not None:
        spec = spec.changed(paths=spec.paths.model_copy(update={"disks": None}))
    own = None if spec.paths.disks is None else consent.path(spec.paths.disks)
    above = os.path.realpath(request.folder or own or default_folders()["disks"])
    folder = os.path.join(above, spec.name)
    images = {disk_id: _image(folder, spec, disk_id, record) for disk_id, record in found.saved_disks.items()}
    judged = judge(spec, images=images, inside={}, consent=consent)
    has_memory, left_out = _judge_memory(found, spec, request, judged)
    _refuse_unused(judged, request, found)
    made = judged.spec if judged.refused else _standing_alone(looked_at(judged), images)
    paths = {disk_id: path for disk_id, (path, _) in images.items()}
    return Planned(made, folder, paths, judged.refused, tuple(judged.granted), has_memory, left_out)


def _identified(spec: MachineSpec, request: RestoreRequest) -> MachineSpec:
    """The definition with the wanted name and, unless it is the old machine, an id and serials of its own."""
    if request.name is not None:
        spec = spec.changed(name=request.name)
    if request.register:
        return spec
    disks = [disk.model_copy(update={"serial": uuid.uuid4().hex[:MAX_SERIAL_CHARACTERS]}) for disk in spec.disks]
    return spec.changed(id=str(uuid.uuid4()), disks=disks)


def _judge_memory(
    found: FoundNight, spec: MachineSpec, request: RestoreRequest, judged: Judged
) -> tuple[bool, str | None]:
    """Whether the machine continues from the night's memory, or why not although there is one."""
    if found.memory_state is None:
        return False, None
    judged.used.add("memory")
    problem = request.without_memory
    if problem is None and not request.register:
        problem = "the guest in memory knows the old machine's addresses and serials, which only --register gives"
    if problem is None:  # what is refused is not in the judged definition any more
        problem = problem_of(found.memory_state, spec if judged.refused else judged.spec)
    if problem is not None:
        return False, problem
    if request.consent.allows("memory"):
        judged.granted.append(ALLOWED["memory"])
    else:
        judged.refused[ALLOWED["memory"]] = "--allow memory, or --discard-memory"
    return True, None


def _standing_alone(spec: MachineSpec, images: Mapping[str, object]) -> MachineSpec:
    """The definition whose restored images have no raw parent, whatever the original's had."""
    disks = [disk.model_copy(update={"allow_raw_parent": False}) if disk.id in images else disk for disk in spec.disks]
    return spec.changed(disks=disks)


def _image(folder: str, spec: MachineSpec, disk_id: str, record: backups.DiskRecord) -> tuple[str, ImageFormat]:
    """The path and the format of a disk's new image."""
    kind: ImageFormat = "vhdx" if record.image.name.endswith("vhdx") else "vhd"
    return os.path.join(folder, f"{spec.name}-{disk_id}.{kind}"), kind


def _refuse_unused(judged: Judged, request: RestoreRequest, found: FoundNight) -> None:
    consent = request.consent
    unused: Sequence[str] = sorted({*consent.paths, *consent.switches, *consent.allow} - judged.used)
    if unused:
        raise InvalidSpec(
            f"the definition of {found.machine.name}@{found.manifest.night} has nothing called {unused[0]!r}",
            hint="--dry-run lists what can be allowed",
        )


def refuse_outside(planned: Planned, request: RestoreRequest) -> None:
    """Raise Refused, naming everything that the machine would have from outside the night and was not allowed."""
    if planned.refused:
        raise refusal(
            request.repository, planned.refused, "the definition of the night has what lies outside it",
            hint="allow what you trust with the options in brackets, or everything with --allow all;"
            " --map and --switch replace it",
        )  # fmt: skip
