# Where interrupts and exceptions arrive: a stub for each vector, then one entry that calls the handler.

#include "interrupt-stub.h"
#include "stubs.h"

        .set VECTOR_OFFSET, 72          # of `vector` in struct frame

        .text
        .globl stubs, enter_handler
        .balign STUB_SIZE
stubs:  STUBS 1, enter_handler

enter_handler:                          # a C function keeps all other registers
        save_registers
        mov %rsp, %rdi
        mov VECTOR_OFFSET(%rsp), %eax
        call *handlers(, %rax, 8)
        restore_registers_and_return
