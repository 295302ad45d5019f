# What makes an ELF file a Multiboot kernel, and its first instructions.
# https://www.gnu.org/software/grub/manual/multiboot/multiboot.html

        .set MAGIC, 0x1badb002
        .set FLAGS, 0x3                 # modules on page boundaries; tell us about memory

        .section .multiboot, "a"
        .balign 4
        .long MAGIC
        .long FLAGS
        .long -(MAGIC + FLAGS)          # checksum: the three add up to 0

        .text
        .globl _start
_start:
        mov $stack_end, %esp            # Multiboot gives no stack
        push %ebx                       # main's second argument: address of the boot information
        push %eax                       # main's first argument: 0x2badb002 if a Multiboot loader started us
        call main
halt:
        cli
        hlt
        jmp halt

        .bss
        .balign 16
        .skip 4096
stack_end:
