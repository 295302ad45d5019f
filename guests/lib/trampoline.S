# Where another processor begins: copied to TRAMPOLINE, in real mode, with CS pointing there.

#include "processors.h"

        .set CR4_PAE, 1 << 5
        .set EFER, 0xc0000080
        .set EFER_LME, 1 << 8
        .set CR0, 0x80010031            # PG, WP, NE, ET, PE
        .set LAPIC_ID_REGISTER, 0xfee00020
        .set LAPIC_ID_SHIFT, 24

        .text
        .globl trampoline, trampoline_end, trampoline_cr3
        .code16
trampoline:
        cli
        mov %cs, %ax
        mov %ax, %ds
        lgdtl gdt_pointer - trampoline
        mov $CR4_PAE, %eax
        mov %eax, %cr4
        mov trampoline_cr3 - trampoline, %eax
        mov %eax, %cr3
        mov $EFER, %ecx
        rdmsr
        or $EFER_LME, %eax
        wrmsr
        mov $CR0, %eax                  # from real to long mode at once
        mov %eax, %cr0
        ljmpl $KERNEL_CODE, $long_mode

        .balign 8
gdt_pointer:
        .word GDT_SIZE - 1
        .long gdt
trampoline_cr3:                         # the boot processor fills it in
        .long 0
trampoline_end:

        .code64
long_mode:
        mov $KERNEL_DATA, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        mov $LAPIC_ID_REGISTER, %eax
        mov (%rax), %edi
        shr $LAPIC_ID_SHIFT, %edi       # the first argument: who this is
        lea 1(%rdi), %eax
        shl $PROCESSOR_STACK_SHIFT, %eax
        lea processor_stacks(%rax), %rsp
        call processor_main
