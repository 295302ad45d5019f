// Interrupt controllers: a pair of 8259A, an I/O APIC, and each processor's local APIC.

#include "controllers.h"
#include "pit.h"

enum {
  PIC_MASTER = 0x20,
  PIC_SLAVE = 0xa0,
  ICW1_INIT_ICW4 = 0x11,
  ICW4_8086 = 0x01,
  OCW2_EOI = 0x20,
  PIC_INPUTS = 8,
  CASCADE = 2,
  ELCR = 0x4d0,  // a bit for each IRQ: level-triggered
};

enum {
  IOAPIC_PINS = 24,
  IOREDTBL = 0x10,
  IOAPIC_LEVEL = 1 << 15,
  IOAPIC_MASKED = 1 << 16,
  LAPIC_SVR_ENABLE = 1 << 8,
  LAPIC_ID_SHIFT = 24,
  PIT_PIN = 2,
};

static void pic_mask(uint16_t irqs) {
  outb(PIC_MASTER + 1, irqs);
  outb(PIC_SLAVE + 1, irqs >> 8);
}

void pic_init(void) {
  for (int slave = 0; slave < 2; slave++) {
    uint16_t port = slave ? PIC_SLAVE : PIC_MASTER;
    outb(port, ICW1_INIT_ICW4);
    outb(port + 1, PIC_BASE + slave * PIC_INPUTS);
    outb(port + 1, slave ? CASCADE : 1 << CASCADE);
    outb(port + 1, ICW4_8086);
  }
  pic_mask(0xffff);
}

static volatile uint32_t *ioapic_register(uint32_t index) {
  *(volatile uint32_t *)0xfec00000 = index;
  return (volatile uint32_t *)0xfec00010;
}

static unsigned pin_of(unsigned irq) { return irq == PIT_IRQ ? PIT_PIN : irq; }

static void ioapic_route(unsigned pin, uint32_t low) {
  *ioapic_register(IOREDTBL + 2 * pin + 1) = lapic_id() << LAPIC_ID_SHIFT;
  *ioapic_register(IOREDTBL + 2 * pin) = low;
}

static void spurious(struct frame *frame) { (void)frame; }

void lapic_enable(void) {
  handlers[SPURIOUS_VECTOR] = spurious;
  *lapic(LAPIC_SVR) = LAPIC_SVR_ENABLE | SPURIOUS_VECTOR;
}

unsigned lapic_id(void) { return *lapic(LAPIC_ID) >> LAPIC_ID_SHIFT; }

void send_ipi(unsigned id, uint32_t command) {
  *lapic(LAPIC_ICR_HIGH) = id << LAPIC_ID_SHIFT;
  *lapic(LAPIC_ICR_LOW) = command;
}

void listen(enum route route, unsigned irq, bool level, handler *handle) {
  pic_init();
  if (route == THROUGH_PIC) {
    if (level) outb(ELCR + irq / PIC_INPUTS, 1 << irq % PIC_INPUTS);
    handlers[PIC_BASE + irq] = handle;
    pic_mask(~(1 << irq | 1 << CASCADE));
  } else {
    lapic_enable();
    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++) ioapic_route(pin, IOAPIC_MASKED);
    handlers[IOAPIC_BASE + irq] = handle;
    ioapic_route(pin_of(irq), (IOAPIC_BASE + irq) | (level ? IOAPIC_LEVEL : 0));
  }
}

void mask(enum route route, unsigned irq) {
  if (route == THROUGH_PIC) pic_mask(0xffff);
  else ioapic_route(pin_of(irq), IOAPIC_MASKED);
}

uint32_t ioapic_entry(unsigned irq) { return *ioapic_register(IOREDTBL + 2 * pin_of(irq)); }

void end_of_interrupt(enum route route, unsigned irq) {
  if (route == THROUGH_IOAPIC) {
    *lapic(LAPIC_EOI) = 0;
    return;
  }
  if (irq >= PIC_INPUTS) outb(PIC_SLAVE, OCW2_EOI);
  outb(PIC_MASTER, OCW2_EOI);
}
