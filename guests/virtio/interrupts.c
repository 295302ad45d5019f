// The interrupt table, and the controllers that a device's interrupt comes through: I/O APIC, local APIC.

#include "kernel.h"
#include "ports.h"
#include "virtio-mmio.h"

enum { IOAPIC_BASE = 0x20, SPURIOUS_VECTOR = VECTORS - 1 };

enum {
  PIC_MASTER = 0x20,
  PIC_SLAVE = 0xa0,
  ICW1_INIT_ICW4 = 0x11,
  ICW4_8086 = 0x01,
  CASCADE = 2,
  ALL_MASKED = 0xff,
};

enum {
  IOREGSEL = 0xfec00000,
  IOWIN = 0xfec00010,
  IOREDTBL = 0x10,
  IOAPIC_MASKED = 1 << 16,
  DESTINATION_SHIFT = 24,
};

enum {
  LAPIC_ID = 0xfee00020,
  LAPIC_EOI = 0xfee000b0,
  LAPIC_SVR = 0xfee000f0,
  LAPIC_SVR_ENABLE = 1 << 8,
};

// Intel SDM vol. 3A, "64-Bit Mode IDT".
struct gate {
  uint16_t offset_low, selector;
  uint16_t type;
  uint16_t offset_middle;
  uint32_t offset_high, reserved;
};
enum { GATE_INTERRUPT = 0x8e00 };  // present, for CPL 0, a 64-bit interrupt gate

static struct gate idt[VECTORS];
extern const uint8_t stubs[];

static volatile uint32_t *at(uint32_t address) { return (volatile uint32_t *)(uint64_t)address; }

static void ioapic_write(uint32_t index, uint32_t value) {
  *at(IOREGSEL) = index;
  *at(IOWIN) = value;
}

static void mask_pic(uint16_t port, uint8_t vector, uint8_t cascade) {
  outb(port, ICW1_INIT_ICW4);
  outb(port + 1, vector);
  outb(port + 1, cascade);
  outb(port + 1, ICW4_8086);
  outb(port + 1, ALL_MASKED);
}

void init_interrupts(void) {
  struct {
    uint16_t limit;
    uint64_t base;
  } __attribute__((packed)) pointer = {sizeof idt - 1, (uint64_t)idt};

  for (unsigned vector = 0; vector < VECTORS; vector++) {
    uint64_t offset = (uint64_t)stubs + vector * STUB_SIZE;
    idt[vector] = (struct gate){
        .offset_low = offset,
        .selector = KERNEL_CODE,
        .type = GATE_INTERRUPT,
        .offset_middle = offset >> 16,
        .offset_high = offset >> 32,
    };
  }
  __asm__ volatile("lidt %0" : : "m"(pointer));
  if (!options.irq) return;

  mask_pic(PIC_MASTER, IOAPIC_BASE, 1 << CASCADE);
  mask_pic(PIC_SLAVE, IOAPIC_BASE, CASCADE);
  *at(LAPIC_SVR) = LAPIC_SVR_ENABLE | SPURIOUS_VECTOR;
  for (unsigned pin = 0; pin < IOAPIC_PINS; pin++) ioapic_write(IOREDTBL + 2 * pin, IOAPIC_MASKED);
}

void open_interrupt(unsigned irq) {
  ioapic_write(IOREDTBL + 2 * irq + 1, *at(LAPIC_ID) >> DESTINATION_SHIFT << DESTINATION_SHIFT);
  // Edge-triggered, active high. That is right for lines that devices hold up as well as for those that they
  // pulse, because the handler does not return before InterruptStatus is 0: the next interrupt is a new edge.
  ioapic_write(IOREDTBL + 2 * irq, IOAPIC_BASE + irq);
}

void handle_interrupt(unsigned vector, uint64_t instruction) {
  if (vector == SPURIOUS_VECTOR) return;
  if (vector < IOAPIC_BASE) fail("no exception expected got %u at %lx", vector, instruction);
  virtio_mmio_interrupt(vector - IOAPIC_BASE);
  *at(LAPIC_EOI) = 0;
}
