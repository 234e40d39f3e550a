# SPDX-License-Identifier: Apache-2.0
"""The trial guests: their machine code matches their source, and a complete processor carries out every step.

QEMU's translator is that complete processor: if KVM fails at a step, this proves that the step itself is right.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import require_tool, run
from tests.waiting import becomes
from vmm.kvm import trial_guest as guest

ALL_CODE = (
    guest.REAL_STEP,
    *guest.LONG_STEPS,
    guest.BREAKPOINT_HANDLER,
    guest.PAGE_FAULT_HANDLER,
)
# Loads the rest of the disk to the place that the trial uses, and enters long mode as the trial does.
BOOT_SECTOR = f"""
.intel_syntax noprefix
.code16
start:
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x1f00
    mov si, offset packet
    mov ah, 0x42
    int 0x13
    jc bad
    mov si, offset packet2
    mov ah, 0x42
    int 0x13
    jc bad
    cli
    lgdt [gdt_pointer]
    lidt [idt_pointer]
    mov eax, {guest.PML4}
    mov cr3, eax
    mov eax, 0x40620
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb
    or eax, 0x80010023
    mov cr0, eax
    ljmp {guest.CODE_SELECTOR}, offset inside
bad:
    mov al, 0xff
    out {guest.PORT_TRAP}, al
    hlt
packet: .byte 16, 0
    .word {(0x7C00 - guest.PML4) // 512}, {guest.PML4}, 0
    .quad {guest.PML4 // 512}
packet2: .byte 16, 0
    .word 16, {guest.CODE}, 0
    .quad {guest.CODE // 512}
gdt_pointer: .word {guest.GDT_LIMIT}
    .long {guest.GDT}
idt_pointer: .word {guest.IDT_LIMIT}
    .long {guest.IDT}
.code64
inside:
    mov ax, {guest.DATA_SELECTOR}
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov rsp, {guest.STACK_TOP}
    mov rax, {guest.CODE}
    jmp rax
"""


def assembled(source: str, folder: Path, *, origin: int = 0) -> bytes:
    """The GNU assembler's output for a source in Intel's syntax."""
    text, made, linked, code = (folder / name for name in ("step.s", "step.o", "step.elf", "step.bin"))
    text.write_text(".intel_syntax noprefix\n" + source + "\n")
    run([require_tool("as"), "-o", made, text])
    run([require_tool("ld"), "-e", "0", "-Ttext", hex(origin), "-o", linked, made])
    run([require_tool("objcopy"), "-O", "binary", "-j", ".text", linked, code])
    return code.read_bytes()


@pytest.mark.parametrize("step", ALL_CODE, ids=lambda step: step.name)
def test_code_is_its_source(step: guest.GuestStep, tmp_path: Path) -> None:
    """The bytes of each step are the assembler's output for the text beside them."""
    bits = 16 if step is guest.REAL_STEP else 64
    assert assembled(f".code{bits}\n{step.source}", tmp_path) == step.code


@pytest.mark.kvm
@pytest.mark.parametrize("step", guest.LONG_STEPS, ids=lambda step: step.name)
def test_a_complete_processor_carries_out_every_step(step: guest.GuestStep, tmp_path: Path) -> None:
    """On a processor without faults, each long-mode step reports that it is done, and nothing else."""
    memory = bytearray(guest.memory_image(step))
    sector = assembled(BOOT_SECTOR.replace(".intel_syntax noprefix", ""), tmp_path, origin=0x7C00)
    assert len(sector) <= 510
    memory[: len(sector)] = sector
    memory[510:512] = b"\x55\xaa"
    disk = tmp_path / "disk.raw"
    disk.write_bytes(memory)
    ports = (guest.PORT_DONE, guest.PORT_WRONG, guest.PORT_TRAP)
    command = [require_tool("qemu-system-x86_64"), "-accel", "tcg", "-cpu", "max", "-m", "8", "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-no-reboot", "-drive", f"file={disk},format=raw,if=ide"]
    for port in ports:
        command += ["-chardev", f"file,id=p{port},path={tmp_path}/{port}"]
        command += ["-device", f"isa-debugcon,iobase={port},chardev=p{port}"]

    def said() -> list[bytes]:
        return [path.read_bytes() if (path := tmp_path / str(port)).exists() else b"" for port in ports]

    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            becomes(lambda: any(said()) or process.poll() is not None)
        finally:
            process.kill()
    assert [len(one) for one in said()] == [1, 0, 0], said()


def test_steps_follow_the_features() -> None:
    """A step is left out if, and only if, its processor feature is not offered."""
    assert guest.steps_for(frozenset({"cx16", "xsave"})) == guest.LONG_STEPS
    names = {step.name for step in guest.LONG_STEPS} - {step.name for step in guest.steps_for(frozenset())}
    assert names == {"CMPXCHG16B", "XSAVE and XRSTOR"}


@pytest.mark.parametrize("step", (guest.REAL_STEP, *guest.LONG_STEPS), ids=lambda step: step.name)
def test_parts_of_the_memory_do_not_overlap(step: guest.GuestStep) -> None:
    """Page tables, descriptors, handlers, program and variables do not overlap, and all of them fit."""
    memory = guest.memory_image(step)
    assert len(memory) == guest.MEMORY_BYTES
    program = step.code + b"\xe6\xe0\xf4"
    assert memory[guest.CODE :].startswith(program) and guest.CODE + len(program) < 0x9000
    handlers = memory[guest.HANDLERS : guest.CODE]
    assert guest.BREAKPOINT_HANDLER.code in handlers and guest.PAGE_FAULT_HANDLER.code in handlers
    assert not any(memory[0x9000:])
