# What a stub for an interrupt does around the call of a C function, which keeps all other registers. The stub has pushed
# an error code, or what stands for one, and the vector, which are then above 72 bytes of registers.

        .macro save_registers
        push %rax
        push %rcx
        push %rdx
        push %rsi
        push %rdi
        push %r8
        push %r9
        push %r10
        push %r11
        cld
        .endm

        .macro restore_registers_and_return
        pop %r11
        pop %r10
        pop %r9
        pop %r8
        pop %rdi
        pop %rsi
        pop %rdx
        pop %rcx
        pop %rax
        add $16, %rsp                   # vector and error code
        iretq
        .endm
