# SPDX-License-Identifier: Apache-2.0
# random-read DEVICE COUNT PAGES SEED, for Linux on x86-64: that many reads of 4 KiB each at random pages of a device, one
# after the other, past the guest's cache. Prints the nanoseconds they took. Exit code 1: the device or a read failed.

        .equ    SYS_READ_AT, 17
        .equ    SYS_OPEN, 2
        .equ    SYS_WRITE, 1
        .equ    SYS_EXIT, 60
        .equ    SYS_CLOCK, 228
        .equ    O_DIRECT, 0x4000
        .equ    PAGE, 4096

        .globl  _start
_start: cmpq    $5, (%rsp)
        jne     failed
        movq    24(%rsp), %rdi
        call    number
        movq    %rax, %r12                      # reads left
        movq    32(%rsp), %rdi
        call    number
        movq    %rax, %r13                      # pages
        movq    40(%rsp), %rdi
        call    number
        movq    %rax, %r14                      # state of the generator
        movq    16(%rsp), %rdi
        movl    $O_DIRECT, %esi
        xorl    %edx, %edx
        movl    $SYS_OPEN, %eax
        syscall
        testl   %eax, %eax
        js      failed
        movl    %eax, %ebp
        call    now
        movq    %rax, %r15

1:      testq   %r12, %r12
        jz      2f
        decq    %r12
        movabsq $6364136223846793005, %rax      # Knuth's MMIX generator
        imulq   %rax, %r14
        movabsq $1442695040888963407, %rax
        addq    %rax, %r14
        movq    %r14, %rax
        shrq    $32, %rax
        imulq   %r13, %rax
        shrq    $32, %rax                       # a page below `pages`
        shlq    $12, %rax
        movq    %rax, %r10
        movl    %ebp, %edi
        leaq    buffer(%rip), %rsi
        movl    $PAGE, %edx
        movl    $SYS_READ_AT, %eax
        syscall
        cmpq    $PAGE, %rax
        je      1b
failed: movl    $1, %edi
        movl    $SYS_EXIT, %eax
        syscall

2:      call    now
        subq    %r15, %rax
        leaq    text_end(%rip), %rsi
        movl    $10, %ecx
3:      xorl    %edx, %edx
        divq    %rcx
        addb    $'0', %dl
        decq    %rsi
        movb    %dl, (%rsi)
        testq   %rax, %rax
        jnz     3b
        leaq    text_end + 1(%rip), %rdx
        subq    %rsi, %rdx
        movl    $1, %edi
        movl    $SYS_WRITE, %eax
        syscall
        xorl    %edi, %edi
        movl    $SYS_EXIT, %eax
        syscall

now:    movl    $1, %edi                        # CLOCK_MONOTONIC, in nanoseconds
        leaq    clock(%rip), %rsi
        movl    $SYS_CLOCK, %eax
        syscall
        imulq   $1000000000, clock(%rip), %rax
        addq    clock + 8(%rip), %rax
        ret

number: xorl    %eax, %eax                      # of the decimal text at %rdi
1:      movzbl  (%rdi), %ecx
        subl    $'0', %ecx
        cmpl    $9, %ecx
        ja      2f
        imulq   $10, %rax
        addq    %rcx, %rax
        incq    %rdi
        jmp     1b
2:      ret

        .data
clock:  .quad   0, 0
text:   .fill   24, 1, 0
text_end:
        .ascii  "\n"
        .bss
        .balign PAGE
buffer: .fill   PAGE, 1, 0
