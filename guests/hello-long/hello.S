# Prints a line on the serial port in long mode. Entered with paging on, interrupts off and a usable stack.

        .set SERIAL_DATA, 0x3f8         # 16550: transmit holding register
        .set SERIAL_STATUS, 0x3fd       # 16550: line status register
        .set CAN_SEND, 0x20             # its bit THRE: the next byte may be written
        .set DEBUG_EXIT, 0xf4

        .globl _start
_start:
        lea message(%rip), %rsi

next_byte:
        lodsb                           # al = the byte at rsi; rsi += 1
        test %al, %al
        jz done
        mov %al, %bl
        mov $SERIAL_STATUS, %edx
wait:
        in %dx, %al
        test $CAN_SEND, %al
        jz wait
        mov %bl, %al
        mov $SERIAL_DATA, %edx
        out %al, %dx
        jmp next_byte

done:
        mov $0x10, %eax                 # success: exit status 0x10 * 2 + 1 = 33
        out %eax, $DEBUG_EXIT
halt:
        hlt
        jmp halt

message:
        .asciz "Hello from long mode\n"
