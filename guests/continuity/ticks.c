// The timer's interrupts, which the first processor takes: those of the PIT, through both PIC and I/O APIC, or those of
// the local APIC's timer, which is started anew for each.

#include "kernel.h"
#include "pit.h"

enum {
  HZ = 200,
  LAPIC_PERIOD = 5000000,  // at 1 GHz, which is what KVM and QEMU have
  LAPIC_DIVIDE_BY_1 = 0x0b,
  PIC_SPURIOUS = PIC_BASE + 7,
  READ_BACK_STATUS_0 = 0xe2,
  STATUS_CONTROL = 0x3f,       // what was written to the control register
  IOAPIC_CONFIGURED = ~0x5000,  // all but what tells how far an interrupt has come
};

// Ticks taken on each way.
static volatile unsigned through_pic, through_ioapic, by_lapic;
static uint64_t hash;
static uint8_t pic_masks[2];
static uint32_t redirection;

// Whether that was one of those that count.
static bool take(volatile unsigned *taken, unsigned vector) {
  if (*taken == options.ticks) return false;
  *taken = *taken + 1;
  hash += mix(vector, *taken);
  check_state(BOOT_PROCESSOR);
  return true;
}

static void check_pit(void) {
  outb(PIT_CONTROL, READ_BACK_STATUS_0);
  uint8_t status = inb(PIT_COUNTER_0);
  if ((status & STATUS_CONTROL) != COUNTER_0_RATE) lost("PIT", status);
}

static void pic_tick(struct frame *frame) {
  if (take(&through_pic, frame->vector)) {
    check_pit();
    if (inb(PIC_MASTER_MASK) != pic_masks[0]) lost("PIC mask", inb(PIC_MASTER_MASK));
    if (inb(PIC_SLAVE_MASK) != pic_masks[1]) lost("PIC mask", inb(PIC_SLAVE_MASK));
    if (through_pic == options.ticks) mask(THROUGH_PIC, PIT_IRQ);
  }
  end_of_interrupt(THROUGH_PIC, PIT_IRQ);
}

static void ioapic_tick(struct frame *frame) {
  if (take(&through_ioapic, frame->vector)) {
    uint32_t entry = ioapic_entry(PIT_IRQ) & IOAPIC_CONFIGURED;
    if (entry != redirection) lost("I/O APIC", entry);
    if (through_ioapic == options.ticks) mask(THROUGH_IOAPIC, PIT_IRQ);
  }
  end_of_interrupt(THROUGH_IOAPIC, PIT_IRQ);
}

static void lapic_tick(struct frame *frame) {
  if (take(&by_lapic, frame->vector) && by_lapic < options.ticks) *lapic(LAPIC_TIMER_INITIAL) = LAPIC_PERIOD;
  *lapic(LAPIC_EOI) = 0;
}

// What a PIC gives for an interrupt that was masked at the last moment; it wants no end.
static void spurious(struct frame *frame) { (void)frame; }

void start_ticks(void) {
  if (options.lapic_timer) {
    handlers[TICK_VECTOR] = lapic_tick;
    *lapic(LAPIC_TIMER_DIVIDE) = LAPIC_DIVIDE_BY_1;
    *lapic(LAPIC_LVT_TIMER) = TICK_VECTOR;
    *lapic(LAPIC_TIMER_INITIAL) = LAPIC_PERIOD;
    return;
  }
  listen(THROUGH_IOAPIC, PIT_IRQ, false, ioapic_tick);
  listen(THROUGH_PIC, PIT_IRQ, false, pic_tick);
  handlers[PIC_SPURIOUS] = spurious;
  pic_masks[0] = inb(PIC_MASTER_MASK);
  pic_masks[1] = inb(PIC_SLAVE_MASK);
  redirection = ioapic_entry(PIT_IRQ) & IOAPIC_CONFIGURED;
  pit_start(HZ);
}

uint64_t finish_ticks(void) {
  if (options.ticks == 0) return 0;
  if (options.lapic_timer) {
    sleep_until(&by_lapic, options.ticks);
  } else {
    sleep_until(&through_pic, options.ticks);
    sleep_until(&through_ioapic, options.ticks);
    pit_stop();
  }
  return hash;
}
