# SPDX-License-Identifier: Apache-2.0
"""Runs the trial guests on /dev/kvm with KVM's own ioctls: no QEMU, a few milliseconds.

Decides how a virtual processor is set up and what its exits mean. What the guests do is decided in `trial_guest`, what
follows from the outcome in `accel`. A faulty KVM may block its caller, so `accel` runs `main` in a separate process,
which it can kill; `main` answers with one line of JSON on its standard output (the descriptor: the library never
prints). Imports only the guests and Python's own modules, so that the process starts quickly.

Sources: Linux Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h (ABI version 12, fixed since Linux 2.6.22).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import struct
import time
from dataclasses import asdict, dataclass, field

from vmm.kvm import trial_guest as guest

API_VERSION = 12
# ioctl requests: of /dev/kvm, of a machine and of a processor.
GET_API_VERSION, CREATE_VM, GET_VCPU_MMAP_SIZE, GET_SUPPORTED_CPUID = 0xAE00, 0xAE01, 0xAE04, 0xC008AE05
CREATE_VCPU, SET_USER_MEMORY_REGION, SET_TSS_ADDR, SET_IDENTITY_MAP_ADDR = 0xAE41, 0x4020AE46, 0xAE47, 0x4008AE48
RUN, SET_REGS, GET_SREGS, SET_SREGS, SET_CPUID2 = 0xAE80, 0x4090AE82, 0x8138AE83, 0x4138AE84, 0x4008AE90
EXIT_REASON_OFFSET, EXIT_UNION_OFFSET = 8, 32  # in struct kvm_run
EXIT_IO, EXIT_HLT, EXIT_SHUTDOWN, EXIT_FAIL_ENTRY, EXIT_INTERNAL_ERROR = 2, 5, 8, 9, 17
_EXIT_NAMES = {
    EXIT_SHUTDOWN: "the guest shut down (triple fault)",
    EXIT_FAIL_ENTRY: "the processor refused to enter it",
}
_EMULATION_FAILED = 1  # kvm_run.internal.suberror
_MAX_EXITS = 1000  # an endless series of reports proves nothing
_CPUID_ENTRY_BYTES, _MAX_CPUID_ENTRIES = 40, 256
_SEGMENT = "<QIHBBBBBBBBBB"  # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
_SEGMENT_BYTES, _SEGMENTS = 24, 8  # cs ds es fs gs ss tr ldt
_SREGS_BYTES, _REGS_BYTES = 312, 144
_GDT_OFFSET, _IDT_OFFSET, _CONTROL_OFFSET = 192, 208, 224  # in struct kvm_sregs
_TSS_ADDRESS, _IDENTITY_MAP_ADDRESS = 0x10000000, 0x10010000  # Intel needs three pages and one for real mode
_RFLAGS_ALWAYS = 2
_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_WP, _CR0_PG = 1, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
_CR4_PAE, _CR4_FXSR, _CR4_XMM, _CR4_XSAVE = 1 << 5, 1 << 9, 1 << 10, 1 << 18
_EFER_LONG = 1 << 8 | 1 << 10
_FEATURE_BITS = {"cx16": 13, "xsave": 26}  # of CPUID leaf 1, ECX


@dataclass
class TrialResult:
    """What the trial observed.

    `refused`: why /dev/kvm could not be used at all (None: it could be). `real_mode`: what went wrong with the
    real-mode guest (None: it succeeded). `done`: the long-mode steps that succeeded; `failed`: those that did not ->
    what happened; `left_out`: those whose processor feature this KVM does not offer to guests.
    """

    refused: str | None = None
    real_mode: str | None = "not tried"
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    microseconds: int = 0

    def to_json(self) -> str:
        """The outcome as one line of JSON."""
        return json.dumps(asdict(self))


def run_trial(device: str = "/dev/kvm") -> TrialResult:
    """Run both kinds of guest. Never raises, whatever the device does; see `TrialResult`."""
    outcome = TrialResult()
    started = time.monotonic_ns()
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        outcome.refused = error.strerror or str(error)
        return outcome
    try:
        version = fcntl.ioctl(fd, GET_API_VERSION)
        if version != API_VERSION:
            outcome.refused = f"it has version {version} of the interface, not {API_VERSION}"
            return outcome
        cpuid = _supported_cpuid(fd)
        features = _features_of(cpuid)
        steps = guest.steps_for(features)
        outcome.left_out = [step.name for step in guest.LONG_STEPS if step not in steps]
        outcome.real_mode = _run_guest(fd, cpuid, guest.REAL_STEP)
        for step in steps:  # a machine for each: what follows a step that fails is seen too
            problem = _run_guest(fd, cpuid, step)
            if problem is None:
                outcome.done.append(step.name)
            else:
                outcome.failed[step.name] = problem
    except OSError as error:
        outcome.refused = f"a request was refused: {error.strerror}"
    finally:
        os.close(fd)
        outcome.microseconds = (time.monotonic_ns() - started) // 1000
    return outcome


def _supported_cpuid(fd: int) -> bytearray:
    """struct kvm_cpuid2, filled in by the kernel."""
    table = bytearray(8 + _MAX_CPUID_ENTRIES * _CPUID_ENTRY_BYTES)
    struct.pack_into("<I", table, 0, _MAX_CPUID_ENTRIES)
    fcntl.ioctl(fd, GET_SUPPORTED_CPUID, table)
    return table


def _features_of(cpuid: bytes | bytearray) -> frozenset[str]:
    (count,) = struct.unpack_from("<I", cpuid, 0)
    for number in range(count):
        function, _, _, _, _, ecx, _ = struct.unpack_from("<7I", cpuid, 8 + number * _CPUID_ENTRY_BYTES)
        if function == 1:
            return frozenset(name for name, bit in _FEATURE_BITS.items() if ecx >> bit & 1)
    return frozenset()


def _run_guest(kvm: int, cpuid: bytearray, step: guest.GuestStep) -> str | None:
    """Make a machine with one processor and run one step until it halts. None on success, else what went wrong."""
    # The memory must outlive the machine: the kernel has only its address.
    memory = mmap.mmap(-1, guest.MEMORY_BYTES)
    memory[:] = guest.memory_image(step)
    anchor = ctypes.c_char.from_buffer(memory)
    fds: list[int] = []
    run: mmap.mmap | None = None
    try:
        machine = fcntl.ioctl(kvm, CREATE_VM, 0)
        fds.append(machine)
        _try_ioctl(machine, SET_TSS_ADDR, _TSS_ADDRESS)
        _try_ioctl(machine, SET_IDENTITY_MAP_ADDR, struct.pack("<Q", _IDENTITY_MAP_ADDRESS))
        region = struct.pack("<IIQQQ", 0, 0, 0, guest.MEMORY_BYTES, ctypes.addressof(anchor))
        fcntl.ioctl(machine, SET_USER_MEMORY_REGION, region)
        processor = fcntl.ioctl(machine, CREATE_VCPU, 0)
        fds.append(processor)
        fcntl.ioctl(processor, SET_CPUID2, cpuid)
        sregs = bytearray(_SREGS_BYTES)
        fcntl.ioctl(processor, GET_SREGS, sregs)
        if step is guest.REAL_STEP:
            _set_real_mode(sregs)
        else:
            _set_long_mode(sregs, has_xsave=step.needs == "xsave")
        fcntl.ioctl(processor, SET_SREGS, bytes(sregs))
        fcntl.ioctl(processor, SET_REGS, _start_registers())
        run = mmap.mmap(processor, fcntl.ioctl(kvm, GET_VCPU_MMAP_SIZE))
        return _run_to_halt(processor, run)
    except OSError as error:
        return f"a request was refused: {error.strerror}"
    finally:
        if run is not None:
            run.close()
        for fd in reversed(fds):
            os.close(fd)
        del anchor
        memory.close()


def _try_ioctl(fd: int, request: int, argument: int | bytes) -> None:
    """For settings that only some processors need; if one is really needed, the run fails and reports it."""
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError:
        return


def _start_registers() -> bytes:
    """struct kvm_regs: all zero except for the stack, the instruction pointer and the bit that is always set."""
    registers = bytearray(_REGS_BYTES)
    struct.pack_into("<Q", registers, 6 * 8, guest.STACK_TOP)
    struct.pack_into("<QQ", registers, 16 * 8, guest.CODE, _RFLAGS_ALWAYS)
    return bytes(registers)


def _set_real_mode(sregs: bytearray) -> None:
    """A processor is in real mode after its reset; only its code segment has to be moved."""
    _, limit, _, *rest = struct.unpack_from(_SEGMENT, sregs, 0)
    struct.pack_into(_SEGMENT, sregs, 0, 0, limit, 0, *rest)


def _set_long_mode(sregs: bytearray, *, has_xsave: bool) -> None:
    """Set up paging, 64-bit segments, descriptor tables and SSE."""
    for number in range(6):
        is_code = number == 0
        selector, kind = (guest.CODE_SELECTOR, 11) if is_code else (guest.DATA_SELECTOR, 3)
        flags = (kind, 1, 0, int(not is_code), 1, int(is_code), 1, 0, 0, 0)
        struct.pack_into(_SEGMENT, sregs, number * _SEGMENT_BYTES, 0, 0xFFFFFFFF, selector, *flags)
    struct.pack_into("<QH", sregs, _GDT_OFFSET, guest.GDT, guest.GDT_LIMIT)
    struct.pack_into("<QH", sregs, _IDT_OFFSET, guest.IDT, guest.IDT_LIMIT)
    cr0 = _CR0_PE | _CR0_MP | _CR0_ET | _CR0_NE | _CR0_WP | _CR0_PG
    cr4 = _CR4_PAE | _CR4_FXSR | _CR4_XMM | (_CR4_XSAVE if has_xsave else 0)
    struct.pack_into("<6Q", sregs, _CONTROL_OFFSET, cr0, 0, guest.PML4, cr4, 0, _EFER_LONG)


def _run_to_halt(processor: int, run: mmap.mmap) -> str | None:
    """Run until the guest halts: None if it reported exactly once that its step succeeded, else what went wrong."""
    is_done = False
    for _ in range(_MAX_EXITS):
        fcntl.ioctl(processor, RUN, 0)
        (reason,) = struct.unpack_from("<I", run, EXIT_REASON_OFFSET)
        if reason == EXIT_HLT:
            return None if is_done else "it halted too early"
        if reason == EXIT_INTERNAL_ERROR:
            (suberror,) = struct.unpack_from("<I", run, EXIT_UNION_OFFSET)
            if suberror == _EMULATION_FAILED:
                return "KVM cannot emulate an instruction"
            return f"KVM had an internal error ({suberror})"
        if reason != EXIT_IO:
            return _EXIT_NAMES.get(reason, f"it left the guest for an unexpected reason ({reason})")
        _, _, port, _, data_offset = struct.unpack_from("<BBHIQ", run, EXIT_UNION_OFFSET)
        if port == guest.PORT_TRAP:
            return f"exception {run[data_offset]}"
        if port != guest.PORT_DONE or is_done:
            return "a wrong result"
        is_done = True
    return "it did not finish"


def main(device: str) -> None:
    """Run the trial in this process and write its outcome to descriptor 1."""
    os.write(1, run_trial(device).to_json().encode() + b"\n")
