# Where interrupts and exceptions arrive: a stub for each vector, then one entry that calls the handler.

#include "interrupt-stub.h"

        .set VECTORS, 256
        .set STUB_SIZE, 16              # as in descriptors.c
        .set VECTOR_OFFSET, 72          # of `vector` in struct frame

# The processor pushes an error code for these alone (Intel SDM vol. 3A, "Exception and Interrupt Reference"),
# and for none that `int n` raises.
        .macro STUBS error_codes
        .set vector, 0
        .rept VECTORS
        .balign STUB_SIZE
        .set has_error_code, vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
        .if !(\error_codes && (has_error_code || vector == 29 || vector == 30))
        push $0
        .endif
        push $vector
        jmp entry
        .set vector, vector + 1
        .endr
        .endm

        .text
        .globl stubs, software_stubs
        .balign STUB_SIZE
stubs:  STUBS 1
        .balign STUB_SIZE
software_stubs:
        STUBS 0

entry:                                  # a C function keeps all other registers
        save_registers
        mov %rsp, %rdi
        mov VECTOR_OFFSET(%rsp), %eax
        call *handlers(, %rax, 8)
        restore_registers_and_return

# A function for each vector that raises it: four bytes each.
        .globl software_interrupts
        .balign 4
software_interrupts:
        .set vector, 0
        .rept VECTORS
        .byte 0xcd, vector              # int n; `int $3` would become the one-byte int3
        ret
        nop
        .set vector, vector + 1
        .endr
