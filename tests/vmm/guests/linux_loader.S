# SPDX-License-Identifier: Apache-2.0
# A boot sector that starts Linux from the disk it lies on: kernel and initial RAM file system lie there as they are,
# in a row of sectors. linux_disk.py fills in where, and the kernel's command line lies in the sector after this one.
# (Linux's Documentation/x86/boot.rst; the BIOS moves what it read above 1 MiB with int 15h, function 87h.)

        .code16
        .equ    SETUP, 0x1000                   # segment of the kernel's own real-mode part
        .equ    COMMAND_LINE, 0xe000            # in that segment
        .equ    BUFFER, 0x2000                  # segment
        .equ    STEP, 64                        # sectors a read
        .equ    KERNEL_ADDRESS, 0x100000

        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp
        sti
        cld
        movb    %dl, drive
        # The command line, then the setup part.
        movw    $1, %cx
        movl    $1, %eax
        movw    $COMMAND_LINE, %di
        movw    $SETUP, %bx
        call    read
        movw    setup_sectors, %cx
        movl    kernel_lba, %eax
        xorw    %di, %di
        call    read
        # The rest of the kernel, the initial RAM file system.
        movzwl  setup_sectors, %eax
        addl    kernel_lba, %eax
        movl    kernel_sectors, %ecx
        movl    $KERNEL_ADDRESS, %edi
        call    load
        movl    initrd_lba, %eax
        movl    initrd_sectors, %ecx
        movl    initrd_address, %edi
        call    load
        # What the kernel wants to know.
        movw    $SETUP, %ax
        movw    %ax, %es
        movb    $0xff, %es:0x210                # type of loader: unknown
        orb     $0x80, %es:0x211                # there is a heap
        movw    $(COMMAND_LINE - 0x200), %es:0x224
        movl    $(SETUP * 16 + COMMAND_LINE), %es:0x228
        movl    initrd_address, %eax
        movl    %eax, %es:0x218
        movl    initrd_bytes, %eax
        movl    %eax, %es:0x21c
        cli
        movw    $SETUP, %ax
        movw    %ax, %ds
        movw    %ax, %fs
        movw    %ax, %gs
        movw    %ax, %ss
        movw    $COMMAND_LINE, %sp
        ljmp    $(SETUP + 0x20), $0

# %ecx sectors from LBA %eax on to the address %edi.
load:   pushl   %ecx
        cmpl    $STEP, %ecx
        jbe     1f
        movl    $STEP, %ecx
1:      pushl   %eax
        pushl   %edi
        movw    $BUFFER, %bx
        xorw    %di, %di
        call    read
        popl    %edi
        pushl   %ecx
        movl    %edi, to_base
        rorl    $24, %edi
        movb    $0x93, to_base + 3              # access rights lie between the address's third and fourth byte
        movw    %di, %ax
        movb    %al, to_base + 5
        roll    $24, %edi
        shlw    $8, %cx                         # words
        movw    $descriptors, %si
        movb    $0x87, %ah
        int     $0x15
        jc      failed
        popl    %ecx
        popl    %eax
        addl    %ecx, %eax
        movl    %ecx, %edx
        shll    $9, %edx
        addl    %edx, %edi
        popl    %edx
        subl    %ecx, %edx
        movl    %edx, %ecx
        jnz     load
        ret

# %cx sectors from LBA %eax on to %bx:%di.
read:   movw    %cx, packet + 2
        movw    %di, packet + 4
        movw    %bx, packet + 6
        movl    %eax, packet + 8
        movw    $packet, %si
        movb    drive, %dl
        movb    $0x42, %ah
        pushl   %ecx
        int     $0x13
        popl    %ecx
        jc      failed
        ret

failed: movw    $0x0e21, %ax                    # "!"
        int     $0x10
1:      hlt
        jmp     1b

drive:  .byte   0
packet: .byte   16, 0
        .word   0, 0, 0
        .quad   0
descriptors:                                    # two empty, from, to, two that the BIOS fills in
        .fill   16, 1, 0
        .word   0xffff, (BUFFER * 16) & 0xffff
        .byte   (BUFFER * 16) >> 16, 0x93
        .word   0
        .word   0xffff
to_base:
        .word   0
        .byte   0, 0x93
        .word   0
        .fill   16, 1, 0

        .org    416
parameters:                                     # 24 bytes, filled in by linux_disk.py
kernel_lba:     .long   0
kernel_sectors: .long   0                       # without the setup part
initrd_lba:     .long   0
initrd_sectors: .long   0
initrd_bytes:   .long   0
initrd_address: .long   0
setup_sectors:  .word   0                       # with the boot sector's place
        .org    446                             # the partition table
        .org    510
        .word   0xaa55
