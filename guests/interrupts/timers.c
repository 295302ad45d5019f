// Timers: HZ or a rate, and how many ticks to wait for, are on the command line.

#include "kernel.h"
#include "pit.h"

enum {
  PORT_B = 0x61,
  PORT_B_GATE_2 = 0x01,
  PORT_B_OUT_2 = 0x20,
};

enum {
  LAPIC_TIMER_PERIODIC = 1 << 17,
  LAPIC_TIMER_MASKED = 1 << 16,
  LAPIC_DIVIDE_BY_16 = 0x03,
  CALIBRATIONS_A_SECOND = 100,
};

enum {
  RTC_IRQ = 8,
  RTC_INDEX = 0x70,
  RTC_DATA = 0x71,
  RTC_A = 0x0a,
  RTC_B = 0x0b,
  RTC_C = 0x0c,
  RTC_A_DIVIDER = 0x20,
  RTC_B_PERIODIC = 0x40,
  RTC_B_24_HOURS = 0x02,
};

static volatile unsigned ticks;
static enum route pit_route;

static void pit_tick(struct frame *frame) {
  (void)frame;
  ticks++;
  end_of_interrupt(pit_route, PIT_IRQ);
}

static void test_pit_through(enum route route, const char *name) {
  unsigned hz = next_number(), wanted = next_number();
  pit_route = route;
  listen(route, PIT_IRQ, false, pit_tick);
  pit_start(hz);
  sleep_until(&ticks, wanted);
  mask(route, PIT_IRQ);
  print_result(name, wanted, " ticks");
}

void test_pit(void) { test_pit_through(THROUGH_PIC, "pit"); }
void test_pit_ioapic(void) { test_pit_through(THROUGH_IOAPIC, "pit-ioapic"); }

static void lapic_tick(struct frame *frame) {
  (void)frame;
  ticks++;
  *lapic(LAPIC_EOI) = 0;
}

// How often the local APIC's timer counts in a second, by the clock of the PIT.
static uint64_t measure_lapic_timer(void) {
  unsigned count = PIT_HZ / CALIBRATIONS_A_SECOND;
  outb(PORT_B, 0);
  outb(PIT_CONTROL, COUNTER_2_ONE_SHOT);
  outb(PIT_COUNTER_2, count);
  outb(PORT_B, PORT_B_GATE_2);
  *lapic(LAPIC_TIMER_DIVIDE) = LAPIC_DIVIDE_BY_16;
  *lapic(LAPIC_LVT_TIMER) = LAPIC_TIMER_MASKED;
  *lapic(LAPIC_TIMER_INITIAL) = UINT32_MAX;
  outb(PIT_COUNTER_2, count >> 8);  // starts it
  while (!(inb(PORT_B) & PORT_B_OUT_2)) continue;
  return (uint64_t)(UINT32_MAX - *lapic(LAPIC_TIMER_CURRENT)) * CALIBRATIONS_A_SECOND;
}

void test_lapic_timer(void) {
  unsigned hz = next_number(), wanted = next_number();
  lapic_enable();
  uint32_t period = measure_lapic_timer() / hz;
  handlers[LAPIC_BASE_VECTOR] = lapic_tick;
  *lapic(LAPIC_LVT_TIMER) = LAPIC_TIMER_PERIODIC | LAPIC_BASE_VECTOR;
  *lapic(LAPIC_TIMER_INITIAL) = period;
  sleep_until(&ticks, wanted);
  *lapic(LAPIC_TIMER_INITIAL) = 0;
  print_result("lapic", wanted, " ticks");
}

static uint8_t rtc_read(uint8_t index) {
  outb(RTC_INDEX, index);
  return inb(RTC_DATA);
}

static void rtc_write(uint8_t index, uint8_t value) {
  outb(RTC_INDEX, index);
  outb(RTC_DATA, value);
}

static void rtc_tick(struct frame *frame) {
  (void)frame;
  if (rtc_read(RTC_C) & RTC_B_PERIODIC) ticks++;  // flags are at the places of the enables
  end_of_interrupt(THROUGH_PIC, RTC_IRQ);
}

void test_rtc(void) {
  unsigned rate = next_number(), wanted = next_number();
  listen(THROUGH_PIC, RTC_IRQ, false, rtc_tick);
  rtc_write(RTC_A, RTC_A_DIVIDER | rate);
  rtc_write(RTC_B, RTC_B_PERIODIC | RTC_B_24_HOURS);
  rtc_read(RTC_C);
  sleep_until(&ticks, wanted);
  rtc_write(RTC_B, RTC_B_24_HOURS);
  print_result("rtc", wanted, " ticks");
}
