# Code that raises exceptions, and the way out of it.

#include "descriptors.h"

        .set RFLAGS_RESERVED, 0x2       # always set
        .set TRAP, 0x100
        .set OVERFLOW, 0x800
        .set ALIGNMENT_CHECK, 0x40000

        .text

# void attempt(void (*raise)(void)): calls it. A handler that can go on nowhere else goes on at `recover`,
# which returns from here.
        .globl attempt, recover, recovery_stack
attempt:
        push %rbx
        push %rbp
        push %r12
        push %r13
        push %r14
        push %r15
        mov %rsp, recovery_stack
        call *%rdi
recover:
        mov recovery_stack, %rsp
        pop %r15
        pop %r14
        pop %r13
        pop %r12
        pop %rbp
        pop %rbx
        ret

        .globl raise_db                 # a trap behind the instruction that follows popf
raise_db:
        pushfq
        orl $TRAP, (%rsp)
        popfq
        nop
        ret

# iretq is the way to code of another kind.
        .macro CONTINUE_AT target, code, data, rflags, stack
        push $\data
        push \stack
        push $(\rflags | RFLAGS_RESERVED)
        push $\code
        push $\target
        iretq
        .endm

# `into` and `bound` exist in 32-bit code alone.
        .globl raise_of, raise_br
raise_of:
        mov %rsp, %rax
        CONTINUE_AT overflow_32, KERNEL_CODE_32, KERNEL_DATA, OVERFLOW, %rax
raise_br:
        mov %rsp, %rdx
        xor %eax, %eax
        CONTINUE_AT bound_32, KERNEL_CODE_32, KERNEL_DATA, 0, %rdx

        .code32
overflow_32:
        into
bound_32:
        bound %eax, one_to_two
        .code64

# Alignment is checked in user mode alone; and SSE is at hand there on every host.
        .globl raise_ac, raise_xm
raise_ac:
        CONTINUE_AT misaligned, USER_CODE, USER_DATA, ALIGNMENT_CHECK, $user_stack_end
raise_xm:
        CONTINUE_AT divide_by_zero, USER_CODE, USER_DATA, 0, $user_stack_end

misaligned:
        mov one_to_two + 1, %eax
        ud2
divide_by_zero:
        ldmxcsr no_sse_exception_masked
        xorps %xmm1, %xmm1
        movups ones, %xmm0
        divps %xmm1, %xmm0
        ud2

        .section .rodata
        .balign 16
ones:   .float 1, 1, 1, 1
one_to_two:                             # 0 is out of these bounds
        .long 1, 2
no_sse_exception_masked:
        .long 0

        .bss
        .balign 16
        .skip 256
user_stack_end:
recovery_stack:
        .skip 8
