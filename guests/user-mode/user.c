// A program at CPL 3. It times a loop of two instructions, which every host runs at its processor's full speed.

#include "debug-exit.h"
#include "serial.h"

enum { POST_CODE = 0x80, LOOP_STARTS = 1, LOOP_ENDED = 2 };

static uint64_t read_tsc(void) {
  uint32_t low, high;
  __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
  return (uint64_t)high << 32 | low;
}

void user_main(uint64_t iterations) {
  outb(POST_CODE, LOOP_STARTS);  // the host sees when, and can time the loop with its own clock
  uint64_t start = read_tsc();
  uint64_t left = iterations;
  __asm__ volatile("1: dec %0\n\tjnz 1b" : "+r"(left));
  uint64_t cycles = read_tsc() - start;
  outb(POST_CODE, LOOP_ENDED);

  serial_print("iterations ");
  serial_print_number(iterations);
  serial_print(" cycles ");
  serial_print_number(cycles);
  serial_print("\n");
  debug_exit(EXIT_SUCCESS);
}
