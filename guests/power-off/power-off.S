# Switches the machine off by ACPI's sleep state S5.

        .set PM1A_CONTROL, 0x604        # ACPI: PM1a control register, where QEMU has it too
        .set SLEEP_ENABLE, 1 << 13      # SLP_EN; the sleep type SLP_TYP in bits 10 to 12 is 0: S5

        .code16
        .globl _start
_start:
        mov $PM1A_CONTROL, %dx
        mov $SLEEP_ENABLE, %ax
        out %ax, %dx
halt:
        hlt
        jmp halt
