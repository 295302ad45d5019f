# What makes an ELF file a PVH kernel, and its first instructions.
# https://xenbits.xen.org/docs/unstable/misc/pvh.html

        .set PHYS32_ENTRY, 18

        .section .note.xen, "a", @note
        .balign 4
        .long name_end - name           # size of the name
        .long 4                         # size of the descriptor
        .long PHYS32_ENTRY              # type
name:   .asciz "Xen"
name_end:
        .balign 4
        .long pvh_start                 # descriptor: where to start, a physical address

        .text
        .globl pvh_start
pvh_start:
        mov $stack_end, %esp            # PVH gives no stack
        push %ebx                       # main's argument: address of the start information
        call main
halt:
        cli
        hlt
        jmp halt

        .bss
        .balign 16
        .skip 4096
stack_end:
