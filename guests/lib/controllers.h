// Interrupt controllers: a pair of 8259A, an I/O APIC, and each processor's local APIC.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include "descriptors.h"

enum { PIC_BASE = 0x20, LAPIC_BASE_VECTOR = 0x40, IOAPIC_BASE = 0x50, SPURIOUS_VECTOR = 0xff };
enum {
  IPI_FIXED = 0x4000,
  IPI_NMI = 0x4400,
  IPI_INIT = 0x4500,
  IPI_STARTUP = 0x4600,
  IPI_TO_OTHERS = 0xc0000,
};
enum {
  LAPIC_ID = 0x20,
  LAPIC_TPR = 0x80,
  LAPIC_EOI = 0xb0,
  LAPIC_LDR = 0xd0,
  LAPIC_SVR = 0xf0,
  LAPIC_ICR_LOW = 0x300,
  LAPIC_ICR_HIGH = 0x310,
  LAPIC_LVT_TIMER = 0x320,
  LAPIC_LVT_LINT0 = 0x350,
  LAPIC_TIMER_INITIAL = 0x380,
  LAPIC_TIMER_CURRENT = 0x390,
  LAPIC_TIMER_DIVIDE = 0x3e0,
};
enum { PIC_MASTER_MASK = 0x21, PIC_SLAVE_MASK = 0xa1 };

static inline volatile uint32_t *lapic(unsigned offset) {
  return (volatile uint32_t *)(uint64_t)(0xfee00000u + offset);
}
void lapic_enable(void);
unsigned lapic_id(void);
void send_ipi(unsigned id, uint32_t command);

// The way an IRQ takes to the processor.
enum route { THROUGH_PIC, THROUGH_IOAPIC };
// Gives the PIC its vectors, and masks all of its inputs.
void pic_init(void);
// Masks all inputs of that controller, and of the PIC, but this one, which calls `handle`.
void listen(enum route route, unsigned irq, bool level, handler *handle);
void mask(enum route route, unsigned irq);
void end_of_interrupt(enum route route, unsigned irq);
// The low half of an input's entry in the I/O APIC's redirection table.
uint32_t ioapic_entry(unsigned irq);

static inline void disable_interrupts(void) { __asm__ volatile("cli" ::: "memory"); }
static inline void enable_interrupts(void) { __asm__ volatile("sti" ::: "memory"); }

// Sleeps until there have been that many: `sti` lets interrupts in only behind `hlt`, so none is missed.
static inline void sleep_until(const volatile unsigned *count, unsigned wanted) {
  disable_interrupts();
  while (*count < wanted) __asm__ volatile("sti; hlt; cli" ::: "memory");
}
