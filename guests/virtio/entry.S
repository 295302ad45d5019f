# The PVH entry point, the way from there to long mode, and where interrupts arrive.
# https://xenbits.xen.org/docs/unstable/misc/pvh.html

#include "interrupt-stub.h"
#include "kernel.h"

        .set PHYS32_ENTRY, 18
        .set CMDLINE_PADDR, 24          # in the start information: address of the command line

        .set CR0_PG, 1 << 31
        .set CR4_PAE, 1 << 5
        .set EFER, 0xc0000080
        .set EFER_LME, 1 << 8

        # Page table entries
        .set PRESENT_WRITABLE, 0x03
        .set UNCACHED, 0x18             # PCD, PWT
        .set LARGE, 0x80                # in a page directory: the entry maps 2 MiB
        .set LARGE_PAGE, 0x200000
        .set DEVICES, 0xc0000000        # devices' registers are between here and 4 GiB

        .section .note.xen, "a", @note
        .balign 4
        .long name_end - name           # size of the name
        .long 8                         # size of the descriptor
        .long PHYS32_ENTRY              # type
name:   .asciz "Xen"
name_end:
        .balign 4
        .quad pvh_start                 # descriptor: where to start, a physical address

        .text
        .code32
        .globl pvh_start
pvh_start:                              # ebx: address of the start information
        mov %cr4, %eax
        or $CR4_PAE, %eax
        mov %eax, %cr4
        mov $pml4, %eax
        mov %eax, %cr3
        mov $EFER, %ecx
        rdmsr
        or $EFER_LME, %eax
        wrmsr
        mov %cr0, %eax
        or $CR0_PG, %eax
        mov %eax, %cr0
        lgdt gdt_pointer
        ljmp $KERNEL_CODE, $long_mode

        .code64
long_mode:
        mov $KERNEL_DATA, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        mov $stack_end, %esp            # PVH gives no stack
        mov %ebx, %ebx                  # the upper half is undefined after the change of modes
        mov CMDLINE_PADDR(%rbx), %rdi
        call main

# A stub for each vector: STUB_SIZE bytes that push its number, above an error code or what stands for one.
        .globl stubs
        .balign STUB_SIZE
stubs:
        .set vector, 0
        .rept VECTORS
        .balign STUB_SIZE
        # Intel SDM vol. 3A, "Exception and Interrupt Reference".
        .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
        push $0
        .endif
        push $vector
        jmp arrive
        .set vector, vector + 1
        .endr

arrive:                                 # a C function keeps all other registers
        save_registers
        mov 72(%rsp), %edi              # the vector
        mov 88(%rsp), %rsi              # where the processor was
        call handle_interrupt
        restore_registers_and_return

        .data
        .balign 8
gdt:
        .quad 0
        .quad 0x00af9b000000ffff        # KERNEL_CODE: 64-bit
        .quad 0x00cf93000000ffff        # KERNEL_DATA
gdt_end:

gdt_pointer:
        .word gdt_end - gdt - 1
        .long gdt

# The first 4 GiB are where they are. Ready-made: filling them in would take thousands of instructions.
        .balign 4096
pml4:   .quad pdpt + PRESENT_WRITABLE
        .balign 4096
pdpt:
        .set directory, 0
        .rept 4
        .quad directories + directory + PRESENT_WRITABLE
        .set directory, directory + 4096
        .endr
        .balign 4096
directories:
        .set address, 0
        .rept 4 * 512
        .if address < DEVICES
        .quad address + (PRESENT_WRITABLE | LARGE)
        .else
        .quad address + (PRESENT_WRITABLE | LARGE | UNCACHED)
        .endif
        .set address, address + LARGE_PAGE
        .endr

        .bss
        .balign 16
        .skip 16384
stack_end:
