# What makes an ELF file a Linux vmlinux, and its first instructions.
# https://docs.kernel.org/arch/x86/boot.html#id1

        .set BUILD_SALT, 0x100
        .set BOOT_CS, 0x10
        .set BOOT_DS, 0x18

        .section .note.Linux, "a", @note
        .balign 4
        .long name_end - name           # size of the name
        .long salt_end - salt           # size of the descriptor
        .long BUILD_SALT                # type
name:   .asciz "Linux"
name_end:
        .balign 4
salt:   .asciz "hello"                  # descriptor
salt_end:
        .balign 4

        .text
        .globl startup_64
startup_64:                             # rsi: address of boot_params
        mov %cs, %eax
        cmp $BOOT_CS, %eax
        jne halt
        mov %ds, %eax
        cmp $BOOT_DS, %eax
        jne halt
        mov %eax, %ss                   # again, from the GDT that is there
        push $BOOT_CS
        push $1f
        lretq
1:      mov $stack_end, %esp
        mov %rsi, %rdi                  # main's argument
        call main
halt:
        cli
        hlt
        jmp halt

        .bss
        .balign 16
        .skip 4096
stack_end:
