// Talks to a device that the host program wrote: a counter at port 0x500, one more at each read.

#include "debug-exit.h"
#include "serial.h"

enum { COUNTER = 0x500 };

void _start(void) {
  uint8_t sum = 0;
  serial_print("read");
  for (int i = 0; i < 3; i++) {
    uint8_t value = inb(COUNTER);
    serial_print(" ");
    serial_print_number(value);
    sum += value;
  }
  outb(COUNTER, sum);
  serial_print(", wrote ");
  serial_print_number(sum);
  serial_print("\n");
  debug_exit(EXIT_SUCCESS);
}
