# What makes an ELF file a Multiboot 2 kernel, and its first instructions.
# https://www.gnu.org/software/grub/manual/multiboot2/multiboot.html

        .set MAGIC, 0xe85250d6
        .set ARCHITECTURE, 0            # i386: 32-bit protected mode
        .set LENGTH, header_end - header

        .section .multiboot, "a"
        .balign 8
header:
        .long MAGIC
        .long ARCHITECTURE
        .long LENGTH
        .long -(MAGIC + ARCHITECTURE + LENGTH)  # checksum: the four add up to 0

        # Tags: type, flags (0: required), size; each begins at a multiple of 8.
request:
        .short 1                        # information request:
        .short 0
        .long request_end - request
        .long 1, 3, 6, 9                # command line, modules, memory map, ELF sections
request_end:
        .balign 8
        .short 6                        # modules on page boundaries
        .short 0
        .long 8
        .short 0                        # end of the tags
        .short 0
        .long 8
header_end:

        .text
        .globl _start
_start:
        mov $stack_end, %esp            # Multiboot gives no stack
        push %ebx                       # main's second argument: address of the boot information
        push %eax                       # main's first argument: 0x36d76289 if a Multiboot 2 loader started us
        call main
halt:
        cli
        hlt
        jmp halt

        .bss
        .balign 16
        .skip 4096
stack_end:
