// Never ends: after its one line it stays on one jump instruction, with interrupts off.

#include "serial.h"

void _start(void) {
  serial_print("spinning\n");
  for (;;) continue;
}
