# SPDX-License-Identifier: Apache-2.0
"""The paths of vmm: the state home, the runtime folder, the folder of each machine, and the names inside them.

Decides every path of vmm, and that a runtime folder is private: it belongs to our user, no other user may enter it,
and it is not a link. Must not know what the files contain.

    home (of `folders`, else $VMM_HOME, /var/lib/vmm for root, else ~/.local/share/vmm)
      host.json                 settings of the host: default folders
         machines/NAME/            a machine: its folder, or a link to its folder elsewhere
           machine.json            its definition
           was-running  unclean  back-ends.json  events.jsonl  console.log  logs/  saved/  uefi-vars.fd
         switches/                 NAME.json, ID.leases: the virtual switches
         schedules/                what is done at set times (`vmm.schedule.places`)
         disks/  snapshots/        the default places for new ones
    runtime (of `folders`, else $VMM_RUNTIME, /run/vmm for root, else $XDG_RUNTIME_DIR/vmm)
         FIRST-12-OF-ID/           a running machine: state.json, sockets (a unix socket's path has at most 107 bytes)
         sw-FIRST-12-OF-ID/        a switch set up on the host: its sockets, its ports, its journal
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from dataclasses import dataclass

from vmm.model import folders, unfinished
from vmm.model.errors import AccessDenied, InvalidSpec, NotFound, VmmError, of_os_error

MAX_SOCKET_PATH_BYTES = 107
RUNTIME_ID_CHARACTERS = 12
MAX_NAME_CHARACTERS = 64
_NAME = re.compile(r"[^\W_][\w .-]*")
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LONGEST_SOCKET_NAME = "display/vnc.sock"
DEFAULT_KEYS = ("machines", "disks", "snapshots")  # the folders that `vmm host paths set` can change


def home() -> str:
    """The state home: everything that survives a reboot."""
    if chosen := folders.in_use().home or os.environ.get("VMM_HOME"):
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return "/var/lib/vmm"
    return os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "vmm")


def runtime_home() -> str:
    """The runtime folder: everything that does not survive a reboot."""
    if chosen := folders.in_use().runtime or os.environ.get("VMM_RUNTIME"):
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return "/run/vmm"
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(base, "vmm")
    return f"/tmp/vmm-{os.geteuid()}"  # `make_private` makes it private or refuses it


@dataclass(frozen=True, slots=True)
class MachinePaths:
    """The files of one machine. `folder` is the machine's real folder, with links resolved."""

    folder: str

    @property
    def definition(self) -> str:
        """The machine's definition, `vmm.model.spec.MachineSpec` as JSON."""
        return os.path.join(self.folder, "machine.json")

    @property
    def lock(self) -> str:
        """Held (flock) by the command that changes the machine."""
        return os.path.join(self.folder, ".lock")

    @property
    def events(self) -> str:
        """The machine's events, one JSON object per line."""
        return os.path.join(self.folder, "events.jsonl")

    @property
    def console_log(self) -> str:
        """What the guest has written to its serial console."""
        return os.path.join(self.folder, "console.log")

    @property
    def uefi_variables(self) -> str:
        """The machine's own copy of the UEFI variables."""
        return os.path.join(self.folder, "uefi-vars.fd")

    @property
    def saved(self) -> str:
        """The folder with a saved machine's memory and devices; it exists complete or not at all."""
        return os.path.join(self.folder, "saved")

    @property
    def was_running(self) -> str:
        """An empty file that exists while the machine runs; it remains if the host goes down under the machine."""
        return os.path.join(self.folder, "was-running")

    @property
    def unclean(self) -> str:
        """A file that exists from a start until the guest has shut down and written out its file systems."""
        return os.path.join(self.folder, "unclean")

    @property
    def back_ends(self) -> str:
        """The back end of the switch on which each adapter last was (`vmm.store.back_ends`)."""
        return os.path.join(self.folder, "back-ends.json")

    @property
    def logs(self) -> str:
        """The folder of the programs' logs."""
        return os.path.join(self.folder, "logs")

    def log(self, program: str) -> str:
        """The log of `keeper`, `worker`, `qemu` or `disks`."""
        return os.path.join(self.logs, f"{program}.log")


@dataclass(frozen=True, slots=True)
class RuntimePaths:
    """The sockets of one running machine, in a folder of its own."""

    folder: str

    def _in(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @property
    def state(self) -> str:
        """The machine's processes, by number and start time, and the operation in progress."""
        return self._in("state.json")

    @property
    def running(self) -> str:
        """The definition with which the machine was started."""
        return self._in("running.json")

    @property
    def notes(self) -> str:
        """The disk server's folder of notes (`vhdkit serve --remember`)."""
        return self._in("notes")

    @property
    def notes_left(self) -> str | None:
        """The same folder if it exists while the machine is off: then its disk server was killed."""
        return self.notes if os.path.isdir(self.notes) else None

    @property
    def leaving(self) -> str:
        """A marker: the host is stopping, and the machine must carry out its automatic stop action."""
        return self._in("leaving")

    @property
    def control(self) -> str:
        """The worker's control socket (JSON-RPC, one message per line)."""
        return self._in("control.sock")

    @property
    def qmp(self) -> str:
        """QEMU's monitor, used by the worker only."""
        return self._in("qmp.sock")

    @property
    def serial(self) -> str:
        """QEMU's end of the serial console, used by the worker only."""
        return self._in("serial.sock")

    @property
    def console(self) -> str:
        """The worker's end of the serial console, for everyone who may use the machine."""
        return self._in("console.sock")

    @property
    def agent(self) -> str:
        """The guest agent's channel."""
        return self._in("agent.sock")

    @property
    def key_value(self) -> str:
        """The channel of the key-value exchange."""
        return self._in("kvp.sock")

    @property
    def display(self) -> str:
        """The one folder that QEMU itself may write to; it holds the VNC socket."""
        return self._in("display")

    @property
    def vnc(self) -> str:
        """The VNC server of the machine's screen."""
        return os.path.join(self.display, "vnc.sock")

    @property
    def nbd(self) -> str:
        """The NBD server of the disks."""
        return self._in("nbd.sock")

    @property
    def nbd_control(self) -> str:
        """The control socket of the disk server."""
        return self._in("nbd.ctl")

    def socket(self, name: str) -> str:
        """Another socket by name, such as that of an adapter."""
        return self._in(f"{name}.sock")

    def lock(self, role: str) -> str:
        """Held (flock) by the process in that role, `keeper` or `worker`, for as long as it lives."""
        return self._in(f"{role}.lock")


def is_id(machine_id: object) -> bool:
    """True if this could be the id of a machine."""
    return isinstance(machine_id, str) and _ID.fullmatch(machine_id) is not None


def runtime_of(machine_id: str) -> RuntimePaths:
    """The runtime paths of a machine by its id. Raises InvalidSpec for a bad id or too long socket paths."""
    if not is_id(machine_id):  # the folder is emptied when no process uses it: a wrong id must lead nowhere
        raise InvalidSpec(f"{machine_id!r} is not the id of a machine")
    folder = os.path.join(runtime_home(), machine_id.replace("-", "")[:RUNTIME_ID_CHARACTERS])
    longest = os.path.join(folder, _LONGEST_SOCKET_NAME)
    if len(os.fsencode(longest)) > MAX_SOCKET_PATH_BYTES:
        raise InvalidSpec(
            f"is too long for sockets, whose names have at most {MAX_SOCKET_PATH_BYTES} bytes",
            path=runtime_home(),
            hint="set VMM_RUNTIME to a shorter folder",
        )
    return RuntimePaths(folder)


def make_private(folder: str, *, mode: int = 0o700) -> None:
    """Make a folder that only our user may enter, or check that an existing one is such a folder.

    Missing parents are created. A folder of another user, or a link, is refused: in /tmp any user can create one
    first. Raises AccessDenied, NotFound, NoSpace.
    """
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, mode)
        facts = os.lstat(folder)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            raise AccessDenied(
                "is not your folder: another user may have created it",
                path=folder,
                hint="remove it, or set VMM_RUNTIME to another folder",
            )
        if stat.S_IMODE(facts.st_mode) != mode:
            os.chmod(folder, mode)
    except OSError as error:
        raise of_os_error(error, "make the folder", path=folder) from error


def make_folders(folder: str) -> None:
    """Make a folder and its missing parents, each accessible to our user only, whatever the umask. Raises OSError.

    (`os.makedirs` applies its mode to the last folder only.)
    """
    if os.path.isdir(folder):
        return
    make_folders(os.path.dirname(os.path.abspath(folder)))
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise


def make_home() -> None:
    """Make the state home, accessible to our user only."""
    if not os.path.isdir(home()):
        make_private(home())


# -- the host's default folders -----------------------------------------------------------------------------------


def _settings_path() -> str:
    return os.path.join(home(), "host.json")


def registry_folder() -> str:
    """The folder that holds the folder of every machine, or a link to it."""
    return os.path.join(home(), "machines")


def schedules_folder() -> str:
    """The folder with the schedules of this host and what became of their runs."""
    return os.path.join(home(), "schedules")


def switches_folder() -> str:
    """The folder with the definitions of all switches and the leases of their guests."""
    return os.path.join(home(), "switches")


def switch_file(name: str) -> str:
    """The definition of the switch with that name (`vmm.net.switch_spec`), as JSON. Raises NotFound."""
    if "/" in name or "\0" in name or name.startswith("."):
        raise NotFound(f"switch {name!r} does not exist")
    return os.path.join(switches_folder(), f"{name}.json")


def switch_leases(switch_id: str) -> str:
    """The addresses leased to guests of an internal switch (`vmm.net.lease_file`)."""
    return os.path.join(switches_folder(), f"{switch_id}.leases")


def check_name(name: str) -> None:
    """Raise ValueError if no machine can have this name: it is used as a folder name and on command lines."""
    if not _NAME.fullmatch(name) or name != name.strip() or len(name) > MAX_NAME_CHARACTERS or name.endswith("."):
        raise ValueError(
            f"{name!r} cannot be the name of a machine: use letters, digits, space, '.', '_' and '-', a letter or "
            f"digit first, at most {MAX_NAME_CHARACTERS} characters"
        )


def machine_folder(name: str) -> str:
    """The real folder of a machine, with links resolved. Raises NotFound."""
    entry = os.path.join(registry_folder(), name)
    try:
        check_name(name)
        os.lstat(entry)
        known = True
    except (ValueError, FileNotFoundError, NotADirectoryError):
        known = False
    except OSError as error:  # an unreadable folder does not mean that the machine does not exist
        raise of_os_error(error, "look for the machine", machine=name, path=entry) from error
    if not known:
        raise NotFound(f"machine {name!r} does not exist", hint="vmm list shows all machines")
    folder = os.path.realpath(entry)
    if not os.path.isdir(folder):
        raise NotFound("the machine's folder is missing; is its file system mounted?", machine=name, path=folder)
    return folder


def default_folders() -> dict[str, str]:
    """The folder for each of `DEFAULT_KEYS`: the one set by the user, or its place in the home. Raises VmmError."""
    found = {key: os.path.join(home(), key) for key in DEFAULT_KEYS}
    try:
        with open(_settings_path(), encoding="utf-8") as file:
            settings = json.load(file)
        chosen = settings.get("paths", {})
        found.update({key: str(chosen[key]) for key in DEFAULT_KEYS if key in chosen})
    except FileNotFoundError:
        pass
    except OSError as error:
        raise of_os_error(error, "read the host's settings", path=_settings_path()) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise VmmError(
            "is damaged: it must contain the host's settings as JSON",
            path=_settings_path(),
            hint="repair or remove it",
        ) from error
    return found


def set_default_folder(key: str, folder: str | None) -> None:
    """Set a default folder, which must exist; None restores the built-in one. Raises InvalidSpec, VmmError."""
    if key not in DEFAULT_KEYS:
        raise InvalidSpec(f"unknown default folder {key!r}; known are {', '.join(DEFAULT_KEYS)}")
    chosen = {name: path for name, path in default_folders().items() if path != os.path.join(home(), name)}
    if folder is None:
        chosen.pop(key, None)
    else:
        if not os.path.isdir(folder):
            raise InvalidSpec("is not a folder", path=folder, hint="create it first")
        chosen[key] = os.path.realpath(folder)
    make_home()
    write_whole(_settings_path(), json.dumps({"paths": chosen}, indent=2).encode() + b"\n")


# -- files that exist whole or not at all -------------------------------------------------------------------------


def write_whole(path: str, content: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Create or replace a file atomically: readers, also after a power cut, see the old or the new content.

    A part file left by a process that was killed here is removed when the next file is written in that folder.

    `durable` waits for the device. Raises AccessDenied, NotFound, NoSpace.
    """
    part = unfinished.part_of(path)
    unfinished.sweep(os.path.dirname(path))
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.rename(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        if durable:
            sync_folder(os.path.dirname(path))
    except OSError as error:
        raise of_os_error(error, "write the file", path=path) from error


def sync_folder(folder: str) -> None:
    """Make the directory entries of a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
