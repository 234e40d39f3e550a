# SPDX-License-Identifier: Apache-2.0
"""The accelerator that machines get, and the proof that it runs a guest.

Decides between KVM (the processor runs the guest) and TCG (QEMU translates its code), and how this is reported.
The existence of a device node proves nothing, so small guests are run: `trial` runs some on /dev/kvm directly, in a
process that is killed if it takes too long, and QEMU itself runs one with the chosen accelerator.

KVM is chosen automatically only if it passed *every* step of the trial. A KVM that emulates kernel code boots a BIOS
and boot sectors, but no common 64-bit kernel: TCG is the better choice there. The user may insist on KVM
(`wanted="kvm"`), which then needs to pass only the real-mode guest. The result is cached in a file of the runtime
folder until the host reboots, or until QEMU, the access rights of the node or the trial itself change.
Processor flags are not decided here. Those of Hyper-V's interface (`hv_*`) are never set: with some KVMs they crash
QEMU.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vmm.kvm import program, trial_guest
from vmm.kvm.trial import TrialResult
from vmm.model.errors import InvalidSpec, Unsupported

KVM_DEVICE = "/dev/kvm"
CACHE_NAME = "accelerator.json"
WANTED = ("auto", "kvm", "tcg")
_CACHE_VERSION = 1
_TRIAL_SECONDS, _QEMU_SECONDS, _DEATH_SECONDS = 10.0, 20.0, 2.0
_MAX_CACHE_BYTES = 1 << 16
_TOO_LONG = "did not end in time"
KERNEL_WORDS = "in 64-bit kernel mode"
_USE_TCG = "use TCG: --accel tcg"
_USE_KVM = "for guests that need no more than that: --accel kvm"
_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_TRIAL_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from vmm.kvm.trial import main; main(sys.argv[2])"
_NO_NODE_HINT = (
    "turn on virtualization in the firmware (in a virtual machine: nested virtualization) and load the module: "
    "sudo modprobe kvm_intel or kvm_amd; in a container pass the device /dev/kvm"
)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """The accelerator to use. `proof`: what was observed; `problem`: why it is not KVM, or what this KVM cannot do."""

    name: Literal["kvm", "tcg"]
    proof: str
    problem: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The results of all trials: KVM by itself, and QEMU with each accelerator (None: it ran the guest)."""

    qemu_path: str
    qemu_version: str
    kvm: TrialResult
    qemu_kvm: str | None
    qemu_tcg: str | None


def probe(
    wanted: str = "auto", *, cache_folder: str | None = None, qemu: str | None = None, refresh: bool = False
) -> Accelerator:
    """The accelerator for `wanted` ("auto", "kvm" or "tcg"), proven by running a guest now or earlier since boot.

    `cache_folder` is a private folder for the results; without it everything is tried now (0.3 s).
    Raises Unsupported without QEMU, or if the wanted accelerator runs no guest.
    """
    return choose(gather(cache_folder=cache_folder, qemu=qemu, refresh=refresh), wanted)


def choose(evidence: Evidence, wanted: str = "auto") -> Accelerator:
    """The accelerator for `wanted`, according to the evidence. Raises Unsupported, InvalidSpec."""
    if wanted not in WANTED:
        raise InvalidSpec(f"unknown accelerator {wanted!r}", hint=f"use one of {', '.join(WANTED)}")
    bare_problem, hint = kvm_problem(evidence)
    if wanted == "kvm" and bare_problem is not None:
        raise Unsupported(f"KVM cannot be used: {bare_problem}", hint=hint)
    lacks = kernel_problem(evidence.kvm)
    if wanted == "kvm" or (wanted == "auto" and bare_problem is None and lacks is None):
        return Accelerator("kvm", _kvm_proof(evidence), lacks, _USE_TCG if lacks else None)
    if evidence.qemu_tcg is not None:
        raise Unsupported(f"QEMU cannot run a guest with TCG: {evidence.qemu_tcg}", path=evidence.qemu_path)
    proof = f"QEMU {evidence.qemu_version} ran a real-mode guest with it"
    if wanted == "tcg":
        return Accelerator("tcg", proof)
    return Accelerator("tcg", proof, f"KVM is not used: {bare_problem or lacks}", hint or _USE_KVM)


def kvm_problem(evidence: Evidence) -> tuple[str | None, str | None]:
    """(why KVM runs no guest at all, what to do about it), or (None, None). Pure except for the lookup of a group."""
    kvm = evidence.kvm
    if kvm.refused is not None:
        return f"{KVM_DEVICE}: {kvm.refused}", _hint_for(kvm.refused)
    if kvm.real_mode is not None:
        return f"it does not run a real-mode guest: {kvm.real_mode}", None
    if evidence.qemu_kvm is not None:
        return f"QEMU {evidence.qemu_version} runs no guest with it: {evidence.qemu_kvm}", None
    return None, None


def kernel_problem(kvm: TrialResult) -> str | None:
    """What a 64-bit kernel would miss according to the trial; None if every step succeeded. Pure."""
    if not kvm.failed:
        return None if kvm.done else "nothing was tried in long mode"
    reasons = sorted(set(kvm.failed.values()))
    return (
        f"{KERNEL_WORDS} this KVM fails at {', '.join(kvm.failed)} ({'; '.join(reasons)}): "
        "it starts firmware and boot sectors, but no common 64-bit kernel"
    )


def _kvm_proof(evidence: Evidence) -> str:
    kvm = evidence.kvm
    did = ", ".join(kvm.done) or "nothing"
    return (
        f"{KVM_DEVICE} ran a real-mode guest and, in 64-bit kernel mode, {did} ({kvm.microseconds / 1000:.0f} ms); "
        f"QEMU {evidence.qemu_version} ran a real-mode guest with it"
    )


def _hint_for(refusal: str) -> str | None:
    if refusal == os.strerror(2):
        return _NO_NODE_HINT
    if refusal in (os.strerror(1), os.strerror(13)):
        try:
            group = grp.getgrgid(os.stat(KVM_DEVICE).st_gid).gr_name
        except (OSError, KeyError):
            group = "kvm"
        if group == "root":
            return f"give a group access: sudo chgrp kvm {KVM_DEVICE} && sudo chmod 660 {KVM_DEVICE}; " + (
                'then join it: sudo usermod -aG kvm "$USER", and log in again'
            )
        return f'join its group: sudo usermod -aG {group} "$USER", and log in again'
    return None


# -- gathering ----------------------------------------------------------------------------------------------------


def gather(*, cache_folder: str | None = None, qemu: str | None = None, refresh: bool = False) -> Evidence:
    """Try KVM and QEMU, or return the cached results. Raises Unsupported if QEMU is missing or does not start."""
    path = qemu or program.find()
    key = _key(path)
    cache_path = None if cache_folder is None else os.path.join(cache_folder, CACHE_NAME)
    if cache_path is not None and not refresh:
        remembered = _remembered(cache_path, key)
        if remembered is not None:
            return remembered
    found = program.inspect(path)
    kvm = kvm_trial()
    usable = kvm.refused is None and kvm.real_mode is None
    qemu_kvm = _qemu_trial(found, "kvm") if usable else "not tried"
    evidence = Evidence(path, found.version, kvm, qemu_kvm, _qemu_trial(found, "tcg"))
    if cache_path is not None and _is_lasting(evidence):
        _remember(cache_path, key, evidence)
    return evidence


def _is_lasting(evidence: Evidence) -> bool:
    """False if a guest only took too long, which on a busy machine says nothing about the accelerator."""
    problems = (evidence.kvm.refused, evidence.kvm.real_mode, evidence.qemu_kvm, evidence.qemu_tcg)
    return not any(problem is not None and problem.endswith(_TOO_LONG) for problem in problems)


def kvm_trial(device: str = KVM_DEVICE, *, timeout_seconds: float = _TRIAL_SECONDS) -> TrialResult:
    """Run the trial guests on KVM in a separate process; see `trial.TrialResult`. Never raises, whatever KVM does."""
    command = [sys.executable, "-I", "-c", _TRIAL_PROGRAM, _PACKAGE_PARENT, device]
    try:
        code, output, _ = _run(command, timeout_seconds)
    except OSError as error:
        return TrialResult(refused=f"the trial cannot be started: {error.strerror}")
    if code is None:
        return TrialResult(refused=f"the trial {_TOO_LONG}")
    try:
        return TrialResult(**json.loads(output))
    except (ValueError, TypeError):
        return TrialResult(refused=f"the trial did not report (it ended with code {code})")


def _qemu_trial(found: program.Program, accelerator: str) -> str | None:
    """Let QEMU run a firmware of a few instructions with this accelerator. None on success, else what happened."""
    if accelerator not in found.accelerators:
        return f"this QEMU was built without {accelerator}"
    image = os.memfd_create("trial-firmware", os.MFD_CLOEXEC)
    try:
        os.write(image, trial_guest.bios_image())
        command = [found.path, "-accel", accelerator, "-machine", "pc", "-m", "2", "-nodefaults", "-no-user-config"]
        command += ["-display", "none", "-no-reboot", "-bios", f"/dev/fd/{image}"]
        command += ["-device", f"isa-debug-exit,iobase={trial_guest.PORT_DONE:#x},iosize=2"]
        code, _, said = _run(command, _QEMU_SECONDS, keep=image)
    except OSError as error:
        return f"it cannot be started: {error.strerror}"
    finally:
        os.close(image)
    if code is None:
        return f"it {_TOO_LONG}"
    if code == trial_guest.BIOS_DONE:
        return None
    last = said.decode(errors="replace").strip().split("\n")[-1]
    return last or f"it ended with code {code}"


def _run(command: list[str], timeout_seconds: float, *, keep: int | None = None) -> tuple[int | None, bytes, bytes]:
    """(exit code, stdout, stderr) of a command; the code is None if it had to be killed.

    A process that the kernel cannot kill is abandoned after a moment, so that it does not hang us too.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=() if keep is None else (keep,),
    )
    try:
        output, said = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return None, b"", b""
    finally:
        if process.returncode is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_DEATH_SECONDS)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    return process.returncode, output, said


# -- caching ------------------------------------------------------------------------------------------------------


def _key(qemu_path: str) -> str:
    """What the evidence depends on: the boot, QEMU's file, our user and groups, and the access to the device."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        boot = "unknown"
    try:
        node = os.stat(KVM_DEVICE)
        device = f"{node.st_mode:o} {node.st_uid} {node.st_gid} {node.st_rdev} {node.st_ctime_ns}"
    except OSError as error:
        device = f"errno {error.errno}"
    groups = ",".join(map(str, sorted(os.getgroups())))
    return f"{_CACHE_VERSION}|{boot}|{program.identity(qemu_path)}|{os.geteuid()}|{groups}|{device}"


def _remembered(path: str, key: str) -> Evidence | None:
    """The cached evidence if it was gathered under the same circumstances; None for anything else in the file."""
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = json.loads(file.read(_MAX_CACHE_BYTES))
        if content["key"] != key:
            return None
        facts = content["evidence"]
        outcome = TrialResult(**facts.pop("kvm"))
        if {field.name for field in fields(Evidence)} != facts.keys() | {"kvm"}:
            return None
        return Evidence(kvm=outcome, **facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _remember(path: str, key: str, evidence: Evidence) -> None:
    """Write the cache file atomically. A failure is ignored: the next call tries everything again."""
    text = json.dumps({"key": key, "evidence": asdict(evidence)})
    with contextlib.suppress(OSError):
        fd, part = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".accelerator-")
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
