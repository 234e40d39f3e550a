# SPDX-License-Identifier: Apache-2.0
"""Minimal guests: a few instructions that an accelerator must be able to run.

Decides which instructions prove that KVM works, how they report, and what a guest's memory looks like around them.
Pure: bytes and numbers, no device, no system call (`trial` runs them).

A guest does one step and reports on I/O ports: on `PORT_DONE` when the step succeeded, on `PORT_WRONG` when a result
is not what the processor must return, on `PORT_TRAP` with the vector when an exception occurs that no step caused
deliberately. Then it halts.

One step is in real mode, in which a BIOS and a boot sector run. The others are in long mode with paging, in ring 0, in
which every 64-bit kernel runs, and do what such kernels do early: SSE, an atomic 16-byte exchange, saving and
restoring the extended state, a page fault and a breakpoint through the interrupt table (Linux tests its breakpoint
handler when it starts). A KVM that emulates kernel code, instead of letting the processor run it, can do the first and
only some of the others.

Memory of each, one slot from address 0:

    0x2000 PML4   0x3000 page-directory pointers   0x4000 page directory   0x5000 IDT
    0x6000 GDT   0x7000 exception handlers, 48 bytes each   0x8000 the step   0x9000 variables
    0xa000 XSAVE area   0xf000 top of the stack

Sources: AMD64 Architecture Programmer's Manual volume 2, chapters 4, 5, 8 and 11.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MEMORY_BYTES = 0x20000
PORT_DONE, PORT_WRONG, PORT_TRAP = 0xE0, 0xE1, 0xE2
PML4, PDPT, PD, IDT, GDT = 0x2000, 0x3000, 0x4000, 0x5000, 0x6000
HANDLERS, CODE, STACK_TOP = 0x7000, 0x8000, 0xF000
CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10
VECTORS = 32  # the exceptions of the architecture
IDT_LIMIT, GDT_LIMIT = VECTORS * 16 - 1, 3 * 8 - 1
_HANDLER_BYTES = 0x30
_BIOS_BYTES, _RESET_OFFSET, _BIOS_DONE_VALUE = 0x10000, 0xFFF0, 0x10
BIOS_DONE = _BIOS_DONE_VALUE << 1 | 1  # isa-debug-exit's exit code for that value
_BREAKPOINT, _PAGE_FAULT = 3, 14
_PRESENT_WRITABLE, _LARGE = 0x3, 0x80
_INTERRUPT_GATE = 0x8E


@dataclass(frozen=True, slots=True)
class GuestStep:
    """What one guest does. `code` is the assembled `source`; a test compares them.

    `needs` names the processor feature without which the step is left out ("cx16", "xsave", or nothing).
    """

    name: str
    source: str
    code: bytes
    needs: str = ""


# In each step, execution continues at the label 2 if the result is right.
REAL_STEP = GuestStep(
    "real mode",
    """
    mov ax, 0x1234
    mov bx, ax
    add bx, 0x1111
    cmp bx, 0x2345
    je 2f
    out 0xe1, al
    2:
    """,
    bytes.fromhex("b8341289c381c3111181fb45237402e6e1"),
)
LONG_STEPS = (
    GuestStep(
        "64-bit arithmetic",
        """
        mov rax, 0x123456789abc
        mov rbx, 3
        imul rbx, rax
        push rbx
        pop rcx
        mov rdx, 0x369d0369d034
        cmp rcx, rdx
        je 2f
        out 0xe1, al
        2:
        """,
        bytes.fromhex("48b8bc9a78563412000048c7c303000000480fafd8535948ba34d069039d3600004839d17402e6e1"),
    ),
    GuestStep(
        "SSE2",
        """
        mov rax, 0x123456789abc
        movq xmm0, rax
        paddq xmm0, xmm0
        movq rbx, xmm0
        add rax, rax
        cmp rax, rbx
        je 2f
        out 0xe1, al
        2:
        """,
        bytes.fromhex("48b8bc9a78563412000066480f6ec0660fd4c066480f7ec34801c04839d87402e6e1"),
    ),
    GuestStep(
        "CMPXCHG16B",
        """
        xor eax, eax
        xor edx, edx
        mov ebx, 5
        mov ecx, 7
        lock cmpxchg16b [0x9000]
        je 2f
        out 0xe1, al
        2: cmp qword ptr [0x9008], 7
        je 2f
        out 0xe1, al
        2:
        """,
        bytes.fromhex("31c031d2bb05000000b907000000f0480fc70c25009000007402e6e148833c2508900000077402e6e1"),
        needs="cx16",
    ),
    GuestStep(
        "XSAVE and XRSTOR",
        """
        xor ecx, ecx
        xor edx, edx
        mov eax, 3
        xsetbv
        mov rbx, 0x123456789abc
        movq xmm0, rbx
        mov eax, 3
        xsave64 [0xa000]
        pxor xmm0, xmm0
        mov eax, 3
        xor edx, edx
        xrstor64 [0xa000]
        movq rcx, xmm0
        cmp rcx, rbx
        je 2f
        out 0xe1, al
        2:
        """,
        bytes.fromhex(
            "31c931d2b8030000000f01d148bbbc9a78563412000066480f6ec3b803000000480fae242500a00000660fefc0"
            "b80300000031d2480fae2c2500a0000066480f7ec14839d97402e6e1"
        ),
        needs="xsave",
    ),
    GuestStep(
        "page fault",
        """
        mov rbx, 0x408000
        mov rax, [rbx]
        cmp rax, [0x8000]
        je 2f
        out 0xe1, al
        2:
        """,
        bytes.fromhex("48c7c300804000488b03483b0425008000007402e6e1"),
    ),
    GuestStep(
        "breakpoint (INT3)",
        """
        mov byte ptr [0x9010], 0
        int3
        cmp byte ptr [0x9010], 1
        je 2f
        out 0xe1, al
        2:
        """,
        bytes.fromhex("c604251090000000cc803c2510900000017402e6e1"),
    ),
)
BREAKPOINT_HANDLER = GuestStep(
    "handler of the breakpoint: remembers that it ran",
    "mov byte ptr [0x9010], 1\niretq",
    bytes.fromhex("c60425109000000148cf"),
)
PAGE_FAULT_HANDLER = GuestStep(
    "handler of the page fault: maps the one page that a step touches",
    """
    push rax
    mov rax, cr2
    cmp rax, 0x408000
    je 2f
    mov al, 14
    out 0xe2, al
    hlt
    2: mov qword ptr [0x4010], 0x83
    pop rax
    add rsp, 8
    iretq
    """,
    bytes.fromhex("500f20d0483d008040007405b00ee6e2f448c704251040000083000000584883c40848cf"),
)


_DONE_AND_HALT = bytes([0xE6, PORT_DONE, 0xF4])  # out PORT_DONE, al; hlt


def steps_for(features: frozenset[str]) -> tuple[GuestStep, ...]:
    """The long-mode steps that a processor with these features must support."""
    return tuple(step for step in LONG_STEPS if not step.needs or step.needs in features)


def bios_image() -> bytes:
    """The real-mode step as a firmware of 64 KiB: the reset vector jumps to the step.

    For a QEMU whose `isa-debug-exit` device has both ports: it exits with `BIOS_DONE` if the step succeeded.
    """
    image = bytearray(b"\xf4" * _BIOS_BYTES)
    program = REAL_STEP.code + bytes([0xB0, _BIOS_DONE_VALUE]) + _DONE_AND_HALT  # mov al, value
    image[: len(program)] = program
    image[_RESET_OFFSET : _RESET_OFFSET + 5] = bytes.fromhex("ea000000f0")  # jmp 0xf000:0
    return bytes(image)


def memory_image(step: GuestStep) -> bytes:
    """The guest's whole memory: its program, page tables, descriptors and handlers."""
    memory = bytearray(MEMORY_BYTES)

    def put(address: int, content: bytes) -> None:
        memory[address : address + len(content)] = content

    put(CODE, step.code + _DONE_AND_HALT)
    put(PML4, struct.pack("<Q", PDPT | _PRESENT_WRITABLE))
    put(PDPT, struct.pack("<Q", PD | _PRESENT_WRITABLE))
    put(PD, struct.pack("<Q", _PRESENT_WRITABLE | _LARGE))  # the first 2 MiB, identity-mapped
    put(GDT, struct.pack("<3Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF))  # none, 64-bit code, data
    for vector in range(VECTORS):
        handler = HANDLERS + vector * _HANDLER_BYTES
        put(IDT + vector * 16, struct.pack("<HHBBHQ", handler, CODE_SELECTOR, 0, _INTERRUPT_GATE, 0, 0))
        if vector == _BREAKPOINT:
            put(handler, BREAKPOINT_HANDLER.code)
        elif vector == _PAGE_FAULT:
            put(handler, PAGE_FAULT_HANDLER.code)
        else:
            put(handler, bytes([0xB0, vector, 0xE6, PORT_TRAP, 0xF4]))  # mov al, vector; out PORT_TRAP, al; hlt
    return bytes(memory)
