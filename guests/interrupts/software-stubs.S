# `int n` for all vectors, and where they arrive.

#include "stubs.h"

        .text
        .globl software_stubs
        .balign STUB_SIZE
software_stubs:
        STUBS 0, enter_handler

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
