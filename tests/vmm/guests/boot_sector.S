# SPDX-License-Identifier: Apache-2.0
# A guest of a few sectors for SeaBIOS: it runs the same from IDE, virtio-blk and virtio-scsi, under TCG and KVM.
# What it says and which keys it knows stands in boot_sector.py, which assembles it and fills in the block `options`.
#
# The first sector loads the rest (int 13h extensions, the same drive) to where it would be if it were one piece.
# %dl, the drive that the BIOS booted, is kept in `drive`. The counter lives in memory only: saved memory has it.

        .code16
        .equ    COM1, 0x3f8
        .equ    PM1_STATUS, 0x600               # SeaBIOS puts the power management block there, on i440FX and Q35
        .equ    PM1_ENABLE, 0x602
        .equ    PM1_CONTROL, 0x604
        .equ    POWER_BUTTON, 0x100
        .equ    BUFFER, 0x9000                  # one sector
        .equ    BIOS_TICKS, 0x46c

        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp
        ljmp    $0, $1f
1:      sti
        cld
        movb    %dl, drive
        movw    $rest_packet, %si
        movb    $0x42, %ah
        int     $0x13
        jnc     rest
        jmp     .                               # (nothing can be said yet: the words are in what was not read)

drive:  .byte   0
rest_packet:                                    # disk address packet: size, sectors, offset, segment, LBA
        .byte   16, 0
        .word   REST_SECTORS, 0x7e00, 0
        .quad   1

        .org    510
        .word   0xaa55

# ---- from here on: the sectors after the first
        .org    512
options:                                        # filled in by boot_sector.py; the offsets are known there
power_off_at_once:      .byte   0               # after reading and writing: power off instead of counting
print_every:            .byte   1               # a "tick N" line each n ticks; 0: none
write_every:            .byte   32              # the counter goes to its sector each n ticks; 0: only when asked to
power_button:           .byte   1               # obey the ACPI power button
read_lba:               .quad   16
write_lba:              .quad   17
count_lba:              .quad   18
        .org    544

rest:   call    serial_init
        movw    $hello, %si
        call    print
        movw    $hello, %si                     # on the screen too, for those who take its picture
        call    show_on_screen
        call    show_sector
        # Write the sector: a text, zeros after it.
        call    clear_buffer
        movw    $write_text, %si
        movw    $BUFFER, %di
        movw    $(write_text_end - write_text), %cx
        rep movsb
        movl    write_lba, %eax
        movl    write_lba + 4, %edx
        call    write_buffer
        movw    $write_ok, %si
        call    print_result
        cmpb    $0, power_off_at_once
        jne     power_off
        # Wake up for received bytes, and let the power button be seen.
        movw    $irq4, 0x0c * 4
        movw    $0, 0x0c * 4 + 2
        inb     $0x21, %al
        andb    $0xef, %al
        outb    %al, $0x21
        movw    $COM1 + 1, %dx
        movb    $1, %al
        outb    %al, %dx
        cmpb    $0, power_button
        je      1f
        movw    $PM1_ENABLE, %dx
        movw    $POWER_BUTTON, %ax
        outw    %ax, %dx
1:      movl    BIOS_TICKS, %eax
        movl    %eax, last_tick
        movw    $ready, %si
        call    print

main:   call    keys
        cmpb    $0, power_button
        je      1f
        movw    $PM1_STATUS, %dx
        inw     %dx, %ax
        testw   $POWER_BUTTON, %ax
        jz      1f
        movw    $button, %si
        call    print
        jmp     power_off
1:      movl    BIOS_TICKS, %eax
        cmpl    last_tick, %eax
        je      2f
        movl    %eax, last_tick
        call    tick
        jmp     main
2:      cli                                     # nothing may arrive between the look and the sleep
        movw    $COM1 + 5, %dx
        inb     %dx, %al
        testb   $1, %al
        jnz     3f
        sti
        hlt
        jmp     main
3:      sti
        jmp     main

tick:   incl    count
        movb    print_every, %bl
        call    due
        jnz     1f
        movw    $tick_text, %si
        call    print_count
1:      movb    write_every, %bl
        call    due
        jnz     1f
        call    write_count
1:      ret

# ZF set when the counter is a multiple of %bl, and %bl is not 0.
due:    movzbl  %bl, %ebx
        testl   %ebx, %ebx
        jz      1f
        movl    count, %eax
        xorl    %edx, %edx
        divl    %ebx
        testl   %edx, %edx
        ret
1:      incl    %ebx                            # clears ZF
        ret

write_count:
        call    clear_buffer
        movl    count, %eax
        movl    %eax, BUFFER
        movl    count_lba, %eax
        movl    count_lba + 4, %edx
        jmp     write_buffer

# Obey what was typed.
keys:   movw    $COM1 + 5, %dx
        inb     %dx, %al
        testb   $1, %al
        jz      9f
        movw    $COM1, %dx
        inb     %dx, %al
        cmpb    $'p', %al
        je      power_off
        cmpb    $'h', %al
        je      halt
        cmpb    $'r', %al
        je      reset
        cmpb    $'c', %al
        je      1f
        cmpb    $'w', %al
        je      2f
        cmpb    $'d', %al
        je      3f
        movb    %al, typed                      # any other key comes back
        movw    $key_text, %si
        call    print
        jmp     keys
1:      movw    $count_text, %si
        call    print_count
        jmp     keys
2:      call    write_count
        jc      4f
        movw    $written_text, %si
        call    print_count
        jmp     keys
4:      movw    $error, %si
        call    print
        jmp     keys
3:      call    show_sector
        jmp     keys
9:      ret

halt:   movw    $halted, %si
        call    print
        cli
1:      hlt
        jmp     1b

reset:  movb    $0xfe, %al                      # the keyboard controller pulls the reset line
        outb    %al, $0x64
1:      hlt
        jmp     1b

power_off:
        movw    $bye, %si
        call    print
        movw    $0x501, %dx                     # isa-debug-exit, where there is one
        movb    $0x10, %al
        outb    %al, %dx
        movw    $PM1_CONTROL, %dx
        movw    $0x2000, %ax
        outw    %ax, %dx
        jmp     halt

# ---- disk
show_sector:                                    # the text of the sector at read_lba
        call    clear_buffer
        movl    read_lba, %eax
        movl    read_lba + 4, %edx
        movb    $0x42, ah_value
        call    disk
        movw    $BUFFER, %si
        jnc     print_line
        movw    $error, %si
        jmp     print

write_buffer:
        movb    $0x43, ah_value
        # falls through

# Move BUFFER from or to the sector in %edx:%eax; carry set when the BIOS reports an error.
disk:   movl    %eax, packet_lba
        movl    %edx, packet_lba + 4
        movw    $packet, %si
        movb    ah_value, %ah
        xorb    %al, %al
        movb    drive, %dl
        int     $0x13
        ret

clear_buffer:
        movw    $BUFFER, %di
        xorw    %ax, %ax
        movw    $256, %cx
        rep stosw
        ret

# ---- serial port
serial_init:                                    # 115200 8N1, FIFO on, the interrupt line connected
        movw    $serial_settings, %si
        movw    $7, %cx
1:      lodsb
        movzbw  %al, %dx
        addw    $COM1, %dx
        lodsb
        outb    %al, %dx
        loop    1b
        ret
serial_settings:
        .byte   1, 0, 3, 0x80, 0, 1, 1, 0, 3, 3, 2, 7, 4, 0x0b

print_result:                                   # %si, or the error when carry is set
        jnc     print
        movw    $error, %si
print:  lodsb                                   # zero-terminated, as it is
        testb   %al, %al
        jz      9f
        call    put
        jmp     print
9:      ret
show_on_screen:
        lodsb
        testb   %al, %al
        jz      9b
        movb    $0x0e, %ah
        movw    $7, %bx
        pushw   %si
        int     $0x10
        popw    %si
        jmp     show_on_screen
print_line:                                     # at most 64 characters up to a zero, then a new line
        movw    $64, %cx
1:      lodsb
        testb   %al, %al
        jz      2f
        call    put
        loop    1b
2:      movw    $newline, %si
        jmp     print
print_count:                                    # %si, the counter in decimal, a new line
        call    print
        movl    count, %eax
        movl    $10, %ebx
        xorw    %cx, %cx
1:      xorl    %edx, %edx
        divl    %ebx
        pushw   %dx
        incw    %cx
        testl   %eax, %eax
        jnz     1b
2:      popw    %ax
        addb    $'0', %al
        call    put
        loop    2b
        movw    $newline, %si
        jmp     print
put:    pushw   %dx
        pushw   %ax
        movw    $COM1 + 5, %dx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        popw    %ax
        movw    $COM1, %dx
        outb    %al, %dx
        popw    %dx
        ret

irq4:   pushw   %ax                             # only there to end a hlt; `keys` reads what arrived
        movb    $0x20, %al
        outb    %al, $0x20
        popw    %ax
        iret

packet: .byte   16, 0
        .word   1, BUFFER, 0
packet_lba:
        .quad   0
count:  .long   0
last_tick:
        .long   0
ah_value:
        .byte   0
hello:  .asciz  "BOOT-OK\r\n"
ready:  .asciz  "READY\r\n"
write_text:
        .ascii  "written by the guest"
write_text_end:
write_ok:
        .asciz  "WRITE-OK\r\n"
error:  .asciz  "DISK-ERROR\r\n"
button: .asciz  "power button\r\n"
bye:    .asciz  "power off\r\n"
halted: .asciz  "halted\r\n"
tick_text:
        .asciz  "tick "
count_text:
        .asciz  "count "
written_text:
        .asciz  "written "
key_text:
        .ascii  "key "
typed:  .byte   0
newline:
        .asciz  "\r\n"
        .org    512 * (1 + REST_SECTORS)
