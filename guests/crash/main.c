// A triple fault: a page fault that finds no handler, nor does the double fault that follows. The CPU shuts down.

#include "serial.h"

void _start(void) {
  serial_print("crashing\n");

  // An interrupt descriptor table without room for a single entry: no exception can be delivered.
  struct { uint16_t limit; uint64_t base; } __attribute__((packed)) no_idt = {0, 0};
  __asm__ volatile("lidt %0" : : "m"(no_idt));

  // 1 TiB is beyond what the page tables map: #PF, then #DF, then shutdown.
  (void)*(volatile char *)(1ul << 40);

  serial_print("still alive\n");
  for (;;) continue;
}
