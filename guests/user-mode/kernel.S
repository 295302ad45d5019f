# The smallest kernel that runs a program in user mode (CPL 3): page tables, a GDT, a TSS, and one iretq.
# All of it, code too, is in sections of its own, which link.ld keeps out of the program's reach.

        .set DEFAULT_ITERATIONS, 200000000

        # Page table entries
        .set PRESENT, 1 << 0
        .set WRITABLE, 1 << 1
        .set USER, 1 << 2               # must be set at every level
        .set LARGE, 1 << 7              # in a page directory: the entry maps 2 MiB

        # Selectors: the descriptor's offset in the GDT, and in bits 0 and 1 the privilege level
        .set USER_DATA, 0x08 | 3
        .set USER_CODE, 0x10 | 3
        .set TSS, 0x18

        .section .kernel.text, "ax"
        .globl _start
_start:                                 # rsi: address of the command line, or 0
        # rdi = how often to loop: the number that the command line begins with, or the default.
        xor %edi, %edi
        xor %eax, %eax
        test %rsi, %rsi
        jz 2f
1:      lodsb                           # al = the byte at rsi; rsi += 1
        sub $'0', %al
        cmp $9, %al
        ja 2f                           # not a digit
        imul $10, %rdi
        add %rax, %rdi
        jmp 1b
2:      test %rdi, %rdi
        jnz 3f
        mov $DEFAULT_ITERATIONS, %edi
3:
        mov $pml4, %eax
        mov %rax, %cr3

        # A descriptor has its base address in pieces, which neither assembler nor linker can split.
        mov $tss, %eax
        mov %ax, gdt_tss + 2
        shr $16, %eax
        mov %al, gdt_tss + 4
        mov %ah, gdt_tss + 7
        lgdt gdt_pointer
        mov $TSS, %eax
        ltr %ax

        # iretq takes five words from the stack, and with them the new privilege level.
        mov $kernel_stack_end, %esp
        push $USER_DATA                 # ss
        push $user_stack_end            # rsp
        push $0x2                       # rflags: interrupts off; bit 1 is always 1
        push $USER_CODE                 # cs
        push $user_main                 # rip
        iretq

        .section .kernel.data, "aw"
        .balign 8
gdt:
        .quad 0
        .quad 0x00cff2000000ffff        # user data: present, privilege level 3, writable
        .quad 0x00affa000000ffff        # user code: present, privilege level 3, executable, 64-bit
gdt_tss:                                # 16 bytes in long mode; _start fills in the base
        .quad 0x0000890000000000 + (tss_end - tss - 1)
        .quad 0
gdt_end:

gdt_pointer:
        .word gdt_end - gdt - 1
        .quad gdt

        # User mode may use a port only if its bit in the TSS's I/O permission bitmap is 0.
        .balign 8
tss:
        .fill 102, 1, 0                 # stacks for interrupts: there are none here
        .word io_bitmap - tss
io_bitmap:
        .org io_bitmap + 0x80 / 8, 0xff
        .byte 0xfe                      # 0x80: POST code
        .org io_bitmap + 0xf0 / 8, 0xff
        .byte 0x0f                      # 0xf4 to 0xf7: debug-exit, written with four bytes
        .org io_bitmap + 0x3f8 / 8, 0xff
        .byte 0x00                      # 0x3f8 to 0x3ff: serial port
        .byte 0xff                      # the CPU reads two bytes at a time: one more, all ones
tss_end:

        # 0 to 2 MiB: for the kernel alone. 2 to 4 MiB: for the user program too. Nothing else is mapped.
        .balign 4096
pml4:   .quad pdpt + (PRESENT | WRITABLE | USER)
        .balign 4096
pdpt:   .quad directory + (PRESENT | WRITABLE | USER)
        .balign 4096
directory:
        .quad 0x000000 | PRESENT | WRITABLE | LARGE
        .quad 0x200000 | PRESENT | WRITABLE | LARGE | USER
        .balign 4096

        .section .kernel.bss, "aw", @nobits
        .balign 16
        .skip 512
kernel_stack_end:

        .bss
        .balign 16
        .skip 4096 - 8                  # a function starts with rsp 8 below a multiple of 16
user_stack_end:
        .skip 8
