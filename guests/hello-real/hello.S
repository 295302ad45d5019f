# Prints a line on the serial port in real mode: 16-bit code, no BIOS, no stack needed.

        .set SERIAL_DATA, 0x3f8         # 16550: transmit holding register
        .set SERIAL_STATUS, 0x3fd       # 16550: line status register
        .set CAN_SEND, 0x20             # its bit THRE: the next byte may be written
        .set DEBUG_EXIT, 0xf4

        .code16
        .globl _start
_start:
        xor %ax, %ax
        mov %ax, %ds                    # a BIOS, unlike nodevisor, may leave anything in ds
        mov $message, %si

next_byte:
        lodsb                           # al = the byte at ds:si; si += 1
        test %al, %al
        jz done
        mov %al, %bl
        mov $SERIAL_STATUS, %dx
wait:
        in %dx, %al
        test $CAN_SEND, %al
        jz wait
        mov %bl, %al
        mov $SERIAL_DATA, %dx
        out %al, %dx
        jmp next_byte

done:
        mov $0x10, %eax                 # success: exit status 0x10 * 2 + 1 = 33
        out %eax, $DEBUG_EXIT
halt:
        hlt
        jmp halt

message:
        .asciz "Hello from real mode\n"
