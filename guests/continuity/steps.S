# The inner loop. At every instruction the answer depends on what is in the general registers, the XMM registers,
# the FPU's stack, the carry flag, and the bases of FS and GS.

#include "worker.h"

        .set STRIDE, 0x1050             # leads to all 4096 places of 16 bytes in 64 KiB
        .set SCRATCH, 0x5ca1ab1e        # what is on the stack before the first step
        .set FCW, 0x0a7f                # all exceptions masked, 53 bits, rounds up
        .set MXCSR, 0x3f80              # all exceptions masked, rounds down

        .text

# void run_steps(struct worker *worker, uint64_t steps)
        .globl run_steps
run_steps:
        push %rbx
        push %rbp
        push %r12
        push %r13
        push %r14
        push %r15
        push %rdi
        push $SCRATCH
        btl $0, WORKER_CARRY(%rdi)      # the carry flag: up to the loop's end, `adc` and `rol` alone touch it
        mov WORKER_POSITION(%rdi), %rcx
        mov 0(%rdi), %rax
        mov 8(%rdi), %rbx
        mov 16(%rdi), %rdx
        mov 24(%rdi), %rbp
        mov 32(%rdi), %r8
        mov 40(%rdi), %r9
        mov 48(%rdi), %r10
        mov 56(%rdi), %r11
        mov 64(%rdi), %r12
        mov 72(%rdi), %r13
        mov 80(%rdi), %r14
        mov 88(%rdi), %r15
        mov WORKER_BUFFER(%rdi), %rdi

1:      adc %r15, %rax
        adc (%rdi, %rcx), %rax
        adc %rax, %rbx
        adc %fs:0, %rbx
        adc %rbx, %rdx
        adc %gs:0, %rdx
        adc %rdx, %rbp
        bswap %rdx
        adc %rbp, %r8
        adc (%rsp), %r8
        adc %r8, %r9
        bswap %r8
        adc %r9, %r10
        rol $23, %r9
        adc %r10, %r11
        adc 8(%rdi, %rcx), %r11
        adc %r11, %r12
        bswap %r11
        adc %r12, %r13
        rol $41, %r12
        adc %r13, %r14
        bswap %r13
        adc %r14, %r15
        bswap %r15
        adc %r15, (%rdi, %rcx)

        # st(0) = (st(0) + an integer) * scale, which always fits into 32 bits; then the next register's turn.
        fiaddl 4(%rdi, %rcx)
        fmull scale
        fistl (%rsp)
        fincstp

        paddq (%rdi, %rcx), %xmm0
        paddq %xmm0, %xmm1
        pxor %xmm1, %xmm2
        paddq %xmm2, %xmm3
        pshufd $0x93, %xmm2, %xmm2
        pxor %xmm3, %xmm4
        paddq %xmm4, %xmm5
        pxor %xmm5, %xmm6
        pshufd $0x39, %xmm5, %xmm5
        paddq %xmm6, %xmm7
        pxor %xmm7, %xmm8
        paddq %xmm8, %xmm9
        pshufd $0x1b, %xmm8, %xmm8
        pxor %xmm9, %xmm10
        paddq %xmm10, %xmm11
        pxor %xmm11, %xmm12
        mulpd scale, %xmm14
        addpd %xmm15, %xmm14
        cvtsi2sdl 8(%rdi, %rcx), %xmm15 # the upper half stays
        pxor %xmm14, %xmm12
        paddq %xmm12, %xmm13
        pshufd $0x4e, %xmm12, %xmm12
        paddq %xmm13, %xmm0
        paddq (%rdi, %rcx), %xmm13
        movdqa %xmm13, (%rdi, %rcx)

        lea STRIDE(%rcx), %ecx
        movzwl %cx, %ecx
        dec %rsi
        jnz 1b

        mov 8(%rsp), %rdi
        mov %rax, 0(%rdi)
        mov %rbx, 8(%rdi)
        mov %rdx, 16(%rdi)
        mov %rbp, 24(%rdi)
        mov %r8, 32(%rdi)
        mov %r9, 40(%rdi)
        mov %r10, 48(%rdi)
        mov %r11, 56(%rdi)
        mov %r12, 64(%rdi)
        mov %r13, 72(%rdi)
        mov %r14, 80(%rdi)
        mov %r15, 88(%rdi)
        mov %rcx, WORKER_POSITION(%rdi)
        setc WORKER_CARRY(%rdi)
        add $16, %rsp
        pop %r15
        pop %r14
        pop %r13
        pop %r12
        pop %rbp
        pop %rbx
        ret

# void start_fpu(const uint8_t *from)
        .globl start_fpu
start_fpu:
        fninit
        fldcw fcw
        ldmxcsr mxcsr
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7
        fildl 4 * \n(%rdi)
        .endr
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
        movdqu 16 + 16 * \n(%rdi), %xmm\n
        .endr
        movapd scale, %xmm14
        movapd thirds, %xmm15
        ret

# void load_upper_halves(const uint64_t halves[16][2])
        .globl load_upper_halves
load_upper_halves:
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vinsertf128 $1, 16 * \n(%rdi), %ymm\n, %ymm\n
        .endr
        ret

# void store_upper_halves(uint64_t halves[16][2])
        .globl store_upper_halves
store_upper_halves:
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vextractf128 $1, %ymm\n, 16 * \n(%rdi)
        .endr
        ret

        .section .rodata
        .balign 16
scale:  .double 0.3, 0.3
thirds: .double 411522.333, 411522.333
fcw:    .word FCW
        .balign 4
mxcsr:  .long MXCSR
