# SPDX-License-Identifier: Apache-2.0
"""Where things lie: the state home, the runtime folder, the folders of a machine, and their names inside.

Decides every path of vmm, and that a runtime folder is private: it is ours, nobody else may enter it, and it is not a
link. Must not know what is in the files.

    home (of `folders`, else $VMM_HOME, /var/lib/vmm for root, else ~/.local/share/vmm)
      host.json                 settings of the host: default folders
      machines/NAME/            a machine: its folder, or a link to it if it lies elsewhere
        machine.json            its definition
        was-running  unclean  back-ends.json  events.jsonl  console.log  logs/  saved/  uefi-vars.fd
      switches/                 NAME.json, ID.leases: the virtual switches
      disks/  snapshots/        where new ones are put by default
    runtime (of `folders`, else $VMM_RUNTIME, /run/vmm for root, else $XDG_RUNTIME_DIR/vmm)
      FIRST-12-OF-ID/           a running machine: sockets (a unix socket's path has at most 107 bytes) and state.json
      sw-FIRST-12-OF-ID/        a switch that is on the host: its sockets, its ports, its journal
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
DEFAULT_KEYS = ("machines", "disks", "snapshots")  # folders that `vmm host paths set` changes


def home() -> str:
    """The folder of everything that outlives a reboot."""
    if chosen := folders.in_use().home or os.environ.get("VMM_HOME"):
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return "/var/lib/vmm"
    return os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "vmm")


def runtime_home() -> str:
    """The folder of everything that a reboot ends."""
    if chosen := folders.in_use().runtime or os.environ.get("VMM_RUNTIME"):
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return "/run/vmm"
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(base, "vmm")
    return f"/tmp/vmm-{os.geteuid()}"  # made private, or refused, by `make_private`


@dataclass(frozen=True, slots=True)
class MachinePaths:
    """The files of one machine. `folder` is where the machine really lies."""

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
        """What happened to the machine, one JSON object a line."""
        return os.path.join(self.folder, "events.jsonl")

    @property
    def console_log(self) -> str:
        """What the guest wrote to its serial console."""
        return os.path.join(self.folder, "console.log")

    @property
    def uefi_variables(self) -> str:
        """The machine's own copy of the UEFI variables."""
        return os.path.join(self.folder, "uefi-vars.fd")

    @property
    def saved(self) -> str:
        """The folder of a saved machine's memory and devices; it is there whole or not at all."""
        return os.path.join(self.folder, "saved")

    @property
    def was_running(self) -> str:
        """An empty file that is there while the machine runs, and after the host stopped under it."""
        return os.path.join(self.folder, "was-running")

    @property
    def unclean(self) -> str:
        """A file that is there from a start on until the guest has shut itself down, its file systems written out."""
        return os.path.join(self.folder, "unclean")

    @property
    def back_ends(self) -> str:
        """On which back end of a switch each adapter was last (`vmm.store.back_ends`)."""
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
        """Who runs: processes by number and start time, and what is being done."""
        return self._in("state.json")

    @property
    def running(self) -> str:
        """The definition as the machine runs with it."""
        return self._in("running.json")

    @property
    def leaving(self) -> str:
        """A mark: the host stops, and the machine is to do what its stop action says."""
        return self._in("leaving")

    @property
    def control(self) -> str:
        """The worker's control socket (JSON-RPC, a message a line)."""
        return self._in("control.sock")

    @property
    def qmp(self) -> str:
        """QEMU's monitor, for the worker alone."""
        return self._in("qmp.sock")

    @property
    def serial(self) -> str:
        """QEMU's end of the serial console, for the worker alone."""
        return self._in("serial.sock")

    @property
    def console(self) -> str:
        """The worker's end of the serial console, for everybody who may use the machine."""
        return self._in("console.sock")

    @property
    def agent(self) -> str:
        """The guest agent's channel."""
        return self._in("agent.sock")

    @property
    def key_value(self) -> str:
        """The channel of the key-value data exchange."""
        return self._in("kvp.sock")

    @property
    def display(self) -> str:
        """A folder that QEMU itself may write into, for its VNC socket alone."""
        return self._in("display")

    @property
    def vnc(self) -> str:
        """The VNC server of the machine's screen."""
        return os.path.join(self.display, "vnc.sock")

    @property
    def nbd(self) -> str:
        """The disks."""
        return self._in("nbd.sock")

    @property
    def nbd_control(self) -> str:
        """The control socket of the disks' server."""
        return self._in("nbd.ctl")

    def socket(self, name: str) -> str:
        """A further socket, such as one of an adapter."""
        return self._in(f"{name}.sock")

    def lock(self, role: str) -> str:
        """Held (flock) by the process of that role, `keeper` or `worker`, as long as it lives."""
        return self._in(f"{role}.lock")


def is_id(machine_id: object) -> bool:
    """True for what can be the id of a machine."""
    return isinstance(machine_id, str) and _ID.fullmatch(machine_id) is not None


def runtime_of(machine_id: str) -> RuntimePaths:
    """The runtime paths of a machine by its id. Raises InvalidSpec for no id, or too long sockets."""
    if not is_id(machine_id):  # the folder is emptied when nobody lives in it: a wrong id must lead nowhere
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
    """Make a folder that only we may enter, or make sure that the one that is there is such a folder.

    Its parents are made where they are missing. A folder of somebody else, or a link, is refused: in /tmp anybody
    can put one there first. Raises AccessDenied, NotFound, NoSpace.
    """
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, mode)
        facts = os.lstat(folder)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            raise AccessDenied(
                "is not a folder of yours: somebody else may have put it there",
                path=folder,
                hint="remove it, or set VMM_RUNTIME to another folder",
            )
        if stat.S_IMODE(facts.st_mode) != mode:
            os.chmod(folder, mode)
    except OSError as error:
        raise of_os_error(error, "make the folder", path=folder) from error


def make_folders(folder: str) -> None:
    """Make a folder, and those above it that are missing, each ours alone whatever the umask is. Raises OSError.

    (`os.makedirs` gives its mode to the last one only.)
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
    """Make the state home, ours alone."""
    if not os.path.isdir(home()):
        make_private(home())


# -- the host's default folders -----------------------------------------------------------------------------------


def _settings_path() -> str:
    return os.path.join(home(), "host.json")


def registry_folder() -> str:
    """Where every machine has its folder, or a link to it."""
    return os.path.join(home(), "machines")


def switches_folder() -> str:
    """Where the definitions of all switches and the leases of their guests are."""
    return os.path.join(home(), "switches")


def switch_file(name: str) -> str:
    """The definition of the switch of that name (`vmm.net.switch_spec`), as JSON. Raises NotFound."""
    if "/" in name or "\0" in name or name.startswith("."):
        raise NotFound(f"there is no switch {name!r}")
    return os.path.join(switches_folder(), f"{name}.json")


def switch_leases(switch_id: str) -> str:
    """The addresses that guests of an internal switch were given (`vmm.net.lease_file`)."""
    return os.path.join(switches_folder(), f"{switch_id}.leases")


def check_name(name: str) -> None:
    """Raise ValueError for a name that no machine can have: it is a folder's name and a word on command lines."""
    if not _NAME.fullmatch(name) or name != name.strip() or len(name) > MAX_NAME_CHARACTERS or name.endswith("."):
        raise ValueError(
            f"{name!r} cannot be the name of a machine: use letters, digits, space, '.', '_' and '-', a letter or "
            f"digit first, at most {MAX_NAME_CHARACTERS} characters"
        )


def machine_folder(name: str) -> str:
    """The folder in which a machine really lies. Raises NotFound."""
    entry = os.path.join(registry_folder(), name)
    try:
        check_name(name)
        os.lstat(entry)
        known = True
    except (ValueError, FileNotFoundError, NotADirectoryError):
        known = False
    except OSError as error:  # not to be seen is not the same as not to be there
        raise of_os_error(error, "look for the machine", machine=name, path=entry) from error
    if not known:
        raise NotFound(f"there is no machine {name!r}", hint="vmm list shows all machines")
    folder = os.path.realpath(entry)
    if not os.path.isdir(folder):
        raise NotFound("the machine's folder is not there; is its disk mounted?", machine=name, path=folder)
    return folder


def default_folders() -> dict[str, str]:
    """The folder for each of `DEFAULT_KEYS`: what was set, else its place in the home. Raises VmmError."""
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
            "is damaged: it should hold the host's settings as JSON", path=_settings_path(), hint="remove or mend it"
        ) from error
    return found


def set_default_folder(key: str, folder: str | None) -> None:
    """Set a default folder, which must exist, or go back to the usual one with None. Raises InvalidSpec, VmmError."""
    if key not in DEFAULT_KEYS:
        raise InvalidSpec(f"there is no default folder {key!r}; there are {', '.join(DEFAULT_KEYS)}")
    chosen = {name: path for name, path in default_folders().items() if path != os.path.join(home(), name)}
    if folder is None:
        chosen.pop(key, None)
    else:
        if not os.path.isdir(folder):
            raise InvalidSpec("is not a folder", path=folder, hint="make it first")
        chosen[key] = os.path.realpath(folder)
    make_home()
    write_whole(_settings_path(), json.dumps({"paths": chosen}, indent=2).encode() + b"\n")


# -- files that are there whole or not at all ---------------------------------------------------------------------


def write_whole(path: str, content: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Put a file there or replace it, so that a reader and a power cut see the old one or the new one.

    What a process that was killed in here left goes with the next file in that folder.

    Raises AccessDenied, NotFound, NoSpace. `durable` waits for the device.
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
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
