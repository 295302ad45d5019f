// Starting other processors: INIT and SIPI, from real mode to long mode.

#include "processors.h"
#include "controllers.h"

enum {
  TRAMPOLINE = 0x80000,  // free, below 1 MiB and on a page, as a SIPI wants it
  PAGE_SHIFT = 12,
};

extern uint8_t trampoline[], trampoline_end[], trampoline_cr3[];
uint8_t processor_stacks[MAX_PROCESSORS << PROCESSOR_STACK_SHIFT] __attribute__((aligned(16)));

void send_startup(unsigned id) { send_ipi(id, IPI_STARTUP | TRAMPOLINE >> PAGE_SHIFT); }

void start_processor(unsigned id) {
  uint64_t cr3;
  __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
  *(volatile uint32_t *)trampoline_cr3 = cr3;
  volatile uint8_t *to = (volatile uint8_t *)TRAMPOLINE;
  for (const uint8_t *from = trampoline; from < trampoline_end; from++) *to++ = *from;
  send_ipi(id, IPI_INIT);
  send_startup(id);
}
