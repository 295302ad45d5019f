// The 8254 timer.
#pragma once

#include "ports.h"

enum {
  PIT_IRQ = 0,
  PIT_HZ = 1193182,
  PIT_COUNTER_0 = 0x40,
  PIT_COUNTER_2 = 0x42,
  PIT_CONTROL = 0x43,
  COUNTER_0_ONE_SHOT = 0x30,  // counter 0, two bytes, mode 0: waits for its count
  COUNTER_0_RATE = 0x34,      // counter 0, two bytes, mode 2: a pulse each period
  COUNTER_2_ONE_SHOT = 0xb0,  // counter 2, two bytes, mode 0: OUT goes up at the end
};

// Interrupts from now on.
static inline void pit_start(unsigned hz) {
  unsigned divisor = PIT_HZ / hz;
  outb(PIT_CONTROL, COUNTER_0_RATE);
  outb(PIT_COUNTER_0, divisor);
  outb(PIT_COUNTER_0, divisor >> 8);
}

static inline void pit_stop(void) { outb(PIT_CONTROL, COUNTER_0_ONE_SHOT); }
