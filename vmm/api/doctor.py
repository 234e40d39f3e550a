# SPDX-License-Identifier: Apache-2.0
"""What this host lacks, what does not work without it, and the command that installs it.

Decides what vmm can use, in which order it matters, and how each is described. What is available is
found out by `kernel`, by a search for programs, and by the accelerator's trial; each check can be run on its own and
changes nothing. Must not know machines.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from vmm.host import kernel
from vmm.kvm import accel, program, uefi, userfault
from vmm.kvm.userfault import Way
from vmm.model import paths
from vmm.model.errors import TimedOut, Unsupported, VmmError

OLDEST_QEMU = (7, 2)  # the first with -netdev stream and dgram, which switches are made of
ISCSI_HINT_PACKAGE = "qemu-block-extra"
_MODULES = ("pydantic", "qemu.qmp", "pyroute2")
_PACKAGE_OF = {"fusermount3": "fuse3", "ip": "iproute2", "nft": "nftables", "unshare": "util-linux"}
_SECONDS = 10.0
_LITTLE_SPACE_BYTES = 1 << 30


class State(StrEnum):
    """How well a feature is available."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Check:
    """One feature of the host that vmm can use.

    `found` is what was seen, `without` what stops working (empty when all is well), `remedy` the command or step that
    helps. If a `needed` feature is missing, no machine can run at all.
    """

    key: str
    title: str
    state: State
    found: str
    without: str = ""
    remedy: str | None = None
    needed: bool = False


def examine() -> list[Check]:
    """Every check, the most important first. Takes about a second, and never raises for what is missing."""
    return [check for examiner in EXAMINERS for check in examiner()]


def is_able(checks: list[Check]) -> bool:
    """True when machines can run on this host. Pure."""
    return not any(check.needed and check.state is State.MISSING for check in checks)


def install(package: str) -> str:
    """The command that installs what Debian calls `package`."""
    if shutil.which("apt-get", path=kernel.program_path()):
        return f"{sudo()}apt install {package}"
    return f"install what Debian calls {package}"


def sudo() -> str:
    """The prefix of a command that only root may run."""
    return "" if os.geteuid() == 0 else "sudo "


def _judge(
    key: str,
    title: str,
    problem: str | None,
    *,
    found: str,
    without: str,
    remedy: str | None,
    needed: bool = False,
    worst: State = State.MISSING,
) -> Check:
    """A check that passes if `problem` is None."""
    if problem is None:
        return Check(key, title, State.OK, found, needed=needed)
    return Check(key, title, worst, problem, without, remedy, needed)


def _program(key: str, name: str, package: str, *, title: str, without: str, needed: bool = False) -> Check:
    path = shutil.which(name, path=kernel.program_path())
    problem = None if path else f"this host has no command {name}"
    return _judge(key, title, problem, found=path or "", without=without, remedy=install(package), needed=needed)


def _helps_with(problem: str | None, usual: str, without_right: str | None = None) -> str:
    """The remedy: the package of a missing command, else the missing permission, else the usual step."""
    for name, package in _PACKAGE_OF.items():
        if problem is not None and problem.endswith(f"no command {name}"):
            return install(package)
    denied = problem is not None and problem.endswith(os.strerror(errno.EACCES))
    return without_right if denied and without_right is not None else usual


# -- what machines need -------------------------------------------------------------------------------------------


def _check_qemu() -> Iterator[Check]:
    title, remedy = "QEMU", install("qemu-system-x86")
    without = "no machine can be started"
    try:
        found = program.inspect(program.find())
    except VmmError as error:
        yield Check("qemu", title, State.MISSING, error.problem, without, remedy, needed=True)
        return
    numbers = tuple(int(part) for part in found.version.split(".")[:2])
    if numbers < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        problem = f"{found.path} is version {found.version}, older than {oldest}"
        yield Check("qemu", title, State.MISSING, problem, without, remedy, needed=True)
        return
    yield Check("qemu", title, State.OK, f"{found.path}, version {found.version}", needed=True)


def _check_privileges() -> Iterator[Check]:
    yield _program(
        "setpriv",
        "setpriv",
        "util-linux",
        title="giving up rights",
        without="no machine can be started, because QEMU would keep the user's privileges",
        needed=True,
    )


def _check_modules() -> Iterator[Check]:
    missing = [name for name in _MODULES if not _is_importable(name)]
    yield _judge(
        "modules",
        "Python modules",
        f"not installed: {', '.join(missing)}" if missing else None,
        found=", ".join(_MODULES),
        without="machines cannot be defined, started or connected",
        remedy="pip install 'vhdkit[vmm]'",
        needed=True,
    )


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _check_accelerator() -> Iterator[Check]:
    try:
        chosen = accel.probe(cache_folder=cache_folder(), refresh=True)
    except Unsupported as error:
        without = "no machine can be started"
        yield Check("kvm", "acceleration", State.MISSING, error.problem, without, error.hint, needed=True)
        return
    if chosen.name == "kvm":
        yield Check("kvm", "acceleration", State.OK, chosen.proof)
        return
    without = "machines run in TCG, which translates their code: they are many times slower"
    state = State.LIMITED if chosen.problem and accel.KERNEL_WORDS in chosen.problem else State.MISSING
    yield Check("kvm", "acceleration", state, chosen.problem or chosen.proof, without, chosen.hint)


def cache_folder() -> str | None:
    """The runtime folder, which keeps the result of the accelerator's trial; None unless it exists and is ours."""
    folder = paths.runtime_home()
    with contextlib.suppress(OSError):
        facts = os.lstat(folder)
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid():
            return folder
    return None


def _check_folders() -> Iterator[Check]:
    for key, title, folder, without in (
        ("home", "folder of machines", paths.home(), "no machine can be made"),
        ("runtime", "folder of running machines", paths.runtime_home(), "no machine can be started"),
    ):
        place = folder
        while not os.path.lexists(place) and place != os.path.dirname(place):
            place = os.path.dirname(place)
        if not os.path.isdir(place):
            problem: str | None = f"{place} is not a folder"
        elif not os.access(place, os.W_OK | os.X_OK):
            problem = f"{place} is not writable"
        else:
            problem = None
        variable = "VMM_HOME" if key == "home" else "VMM_RUNTIME"
        remedy = f"set {variable} to a folder of your own"
        yield _judge(key, title, problem, found=folder, without=without, remedy=remedy, needed=True)
    yield from _check_space()


def _check_space() -> Iterator[Check]:
    folder = paths.home()
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if free < _LITTLE_SPACE_BYTES:
        yield Check(
            "space",
            "free space",
            State.LIMITED,
            f"{free / (1 << 20):.0f} MiB in {folder}",
            "machines pause when their disks cannot grow",
            "make room, or keep machines elsewhere: vmm host paths set disks FOLDER",
        )


# -- what some machines need --------------------------------------------------------------------------------------


def _check_firmware() -> Iterator[Check]:
    firmware = uefi.find()
    yield _judge(
        "uefi",
        "UEFI firmware",
        None if firmware else "OVMF is not installed",
        found=firmware[0] if firmware else "",
        without="machines with --firmware uefi cannot be started",
        remedy=install("ovmf"),
    )


def _check_iscsi() -> Iterator[Check]:
    without, remedy = "iscsi:// disks cannot be passed through", install(ISCSI_HINT_PACKAGE)
    yield _judge("iscsi", "iSCSI in QEMU", _iscsi_problem(), found="yes", without=without, remedy=remedy)


def _iscsi_problem() -> str | None:
    """Have qemu-img open an empty URL: if it knows the protocol, it fails while parsing the URL."""
    tool = shutil.which("qemu-img", path=kernel.program_path())
    if tool is None:
        return "not known: this host has no command qemu-img"
    try:
        done = subprocess.run(
            [tool, "info", "iscsi://"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"qemu-img does not answer: {error}"
    return None if "parse URL" in done.stderr else "QEMU has no module for it"


def _check_capture() -> Iterator[Check]:
    title = "memory saved while the guest runs"
    without = "a snapshot of a running machine stops the guest until its memory is written"
    remedy = f"echo vm.unprivileged_userfaultfd=1 | {sudo()}tee /etc/sysctl.d/60-vmm.conf; {sudo()}sysctl --system"
    root = os.geteuid() == 0
    problem = kernel.write_protecting_userfaultfd()
    if problem is not None:
        yield Check("capture", title, State.MISSING, problem, without, remedy if not root else None)
    elif (way := userfault.best_way()) is Way.EVERYBODY:
        yield Check("capture", title, State.OK, "vm.unprivileged_userfaultfd is 1, so for every machine")
    elif way is Way.DEVICE:
        found = f"{userfault.DEVICE}, for machines with --background-capture; their QEMU needs no other privilege"
        remedy = "for one machine: vmm set NAME --background-capture"
        yield Check("capture", title, State.LIMITED, found, f"for all others {without}", remedy)
    else:
        found = (
            "only for machines whose QEMU keeps CAP_SYS_PTRACE (--background-capture): a guest that escapes from it "
            "has power over the host's processes; vmm blocks the system calls for that, but not what /proc shows"
        )
        remedy = (
            f"QEMU 8 or newer on Linux 6.1 or newer needs only {userfault.DEVICE}; or, for every program of the host: "
            f"{remedy}"
        )
        yield Check("capture", title, State.LIMITED, found, f"for all others {without}", remedy)


def _check_network() -> Iterator[Check]:
    tap = kernel.device("/dev/net/tun")
    yield _judge(
        "tun",
        "taps",
        tap,
        found="/dev/net/tun",
        without="switches with the back end bridge, and so external ones, cannot connect machines",
        remedy=_helps_with(tap, f"{sudo()}modprobe tun", "run vmm as root for those switches"),
    )
    bridge = kernel.bridge()
    yield _judge(
        "bridge",
        "bridges",
        bridge,
        found="yes",
        without="switches with the back end bridge, and so external ones, cannot be created",
        remedy=_helps_with(bridge, f"{sudo()}modprobe bridge"),
    )
    yield _judge(
        "bridge-vlan",
        "VLANs on bridges",
        kernel.bridge_vlan_filtering() if bridge is None else "bridges are not available",
        found="yes",
        without="VLANs need the back end user: vmm switch create NAME --backend user",
        remedy="a kernel with CONFIG_BRIDGE_VLAN_FILTERING",
    )
    guards = kernel.bridge_guards()
    yield _judge(
        "bridge-guard",
        "guards on bridges",
        guards,
        found="yes",
        without="on the back end bridge a guest could use another guest's MAC address",
        remedy=_helps_with(guards, "a kernel with CONFIG_NF_TABLES_BRIDGE"),
    )
    vhost = kernel.device("/dev/vhost-net")
    yield _judge(
        "vhost-net",
        "network in the kernel",
        vhost,
        found="/dev/vhost-net",
        without="QEMU itself moves the packets of taps, which takes more processor time",
        remedy=_helps_with(vhost, f"{sudo()}modprobe vhost_net", "run vmm as root, for which it is used"),
        worst=State.LIMITED,
    )
    yield _program(
        "dhcp",
        "dnsmasq",
        "dnsmasq-base",
        title="DHCP",
        without="guests on internal switches with the back end bridge get no address by themselves",
    )
    yield from _check_switches()


def _check_switches() -> Iterator[Check]:
    """The existing switches; no check if there are none."""
    from vmm.net import switches, watching
    from vmm.net.host_side import HostSide

    wrong = []
    found = switches.load_all()
    for spec in found:
        try:
            wrong += [(spec.name, one.problem) for one in watching.faults(HostSide(spec))]
        except TimedOut as error:
            wrong.append((spec.name, error.problem))
        except VmmError:
            pass
    if found:
        yield _judge(
            "switches",
            "switches",
            "; ".join(f"{name}: {problem}" for name, problem in wrong) or None,
            found=", ".join(spec.name for spec in found),
            without="guests on that switch lack addresses, names or access to other networks, or can break its rules",
            remedy="a running machine on the switch repairs it within a second; see vmm switch show",
            worst=State.LIMITED,
        )


def _check_mount() -> Iterator[Check]:
    fuse = kernel.device("/dev/fuse")
    if fuse is None and shutil.which("fusermount3", path=kernel.program_path()) is None and os.geteuid() != 0:
        fuse = "this host has no command fusermount3"
    yield _judge(
        "fuse",
        "mounting images",
        fuse,
        found="/dev/fuse",
        without="vhdkit mount cannot show a chain as files",
        remedy=_helps_with(fuse, f"{sudo()}modprobe fuse", f"{sudo()}chmod 666 /dev/fuse, as distributions set it"),
    )


def _check_autostart() -> Iterator[Check]:
    there = shutil.which("systemctl", path=kernel.program_path())
    runs = os.path.isdir("/run/systemd/system")
    problem = None if there and runs else "systemd is not installed" if not there else "systemd is not running"
    yield _judge(
        "systemd",
        "starting with the host",
        problem,
        found="systemd",
        without="vmm host autostart cannot start machines with the host",
        remedy="start them with this system's own service manager: vmm host autostart --print shows the commands",
        worst=State.LIMITED,
    )


EXAMINERS: tuple[Callable[[], Iterator[Check]], ...] = (
    _check_qemu,
    _check_privileges,
    _check_modules,
    _check_folders,
    _check_accelerator,
    _check_firmware,
    _check_capture,
    _check_iscsi,
    _check_network,
    _check_mount,
    _check_autostart,
)
