# Restarts the machine as PCs have since the AT: the keyboard controller pulls the processor's reset line.

        .set KEYBOARD_COMMAND, 0x64
        .set PULSE_RESET, 0xfe

        .code16
        .globl _start
_start:
        mov $PULSE_RESET, %al
        out %al, $KEYBOARD_COMMAND
halt:
        hlt
        jmp halt
