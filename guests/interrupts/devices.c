// Devices that interrupt: the host program's at port 0x500, the serial port, the keyboard controller, and the
// host itself.

#include "debug-exit.h"
#include "kernel.h"
#include "serial.h"

enum {
  DEVICE = 0x500,
  SERIAL_IRQ = 4,
  SERIAL_IER = 0x3f9,
  IER_RECEIVED = 0x01,
  SERIAL_MCR = 0x3fc,
  MCR_OUT2 = 0x08,  // lets the interrupt through on a PC
  KEYBOARD_IRQ = 1,
  KEYBOARD_DATA = 0x60,
  KEYBOARD_COMMAND = 0x64,
  WRITE_COMMAND_BYTE = 0x60,
  COMMAND_BYTE_INTERRUPT = 0x01,
  SELF_TEST = 0xaa,
  NMI_VECTOR = 2,
  FIRST_FREE_VECTOR = 32,
  SETTLE = 2000,  // instructions in which an interrupt that is one too many would come
};

static volatile unsigned interrupts;
static enum route device_route;
static unsigned device_irq;

// Nothing but time, with interrupts let in.
static void settle(void) {
  enable_interrupts();
  for (volatile int i = 0; i < SETTLE; i++) continue;
  disable_interrupts();
}

static void serve_device(struct frame *frame) {
  (void)frame;
  interrupts++;
  inb(DEVICE);  // acknowledges: the device may let its line down
  end_of_interrupt(device_route, device_irq);
}

static void listen_to_device(enum route route, bool level, handler *handle) {
  device_route = route;
  device_irq = next_number();
  listen(route, device_irq, level, handle);
}

// IRQ, N: the device holds its line up until it was read for the Nth time.
static void test_level(enum route route) {
  listen_to_device(route, true, serve_device);
  unsigned wanted = next_number();
  outb(DEVICE, 1);
  sleep_until(&interrupts, wanted);
  settle();
  print_result("level", interrupts, " interrupts");
}

void test_level_pic(void) { test_level(THROUGH_PIC); }
void test_level_ioapic(void) { test_level(THROUGH_IOAPIC); }

// IRQ, N: an edge for each interrupt.
static void test_device(enum route route) {
  listen_to_device(route, false, serve_device);
  unsigned wanted = next_number();
  outb(DEVICE, 1);
  sleep_until(&interrupts, wanted);
  settle();
  print_result("device", interrupts, " interrupts");
}

void test_device_pic(void) { test_device(THROUGH_PIC); }
void test_device_ioapic(void) { test_device(THROUGH_IOAPIC); }

static bool ends_interrupts;

static void serve_storm(struct frame *frame) {
  (void)frame;
  if (interrupts++ == 0) serial_print("storm\n");
  if (ends_interrupts) end_of_interrupt(device_route, device_irq);
}

// IRQ, `level` or `edge`, `eoi` or `no-eoi`: nobody ever acknowledges the device.
static void test_storm(enum route route) {
  device_route = route;
  device_irq = next_number();
  bool level = same(next_word(), "level");
  ends_interrupts = same(next_word(), "eoi");
  listen(route, device_irq, level, serve_storm);
  outb(DEVICE, 1);
  for (;;) __asm__ volatile("sti; hlt");
}

void test_storm_pic(void) { test_storm(THROUGH_PIC); }
void test_storm_ioapic(void) { test_storm(THROUGH_IOAPIC); }

static bool line_ended;

static void serve_serial(struct frame *frame) {
  (void)frame;
  while (inb(SERIAL_STATUS) & STATUS_RECEIVED) {
    char byte = inb(SERIAL_DATA);
    serial_write(byte);
    if (byte == '\n') line_ended = true;
  }
  if (line_ended) interrupts++;
  end_of_interrupt(THROUGH_PIC, SERIAL_IRQ);
}

// Sends back a line.
void test_serial(void) {
  listen(THROUGH_PIC, SERIAL_IRQ, false, serve_serial);
  outb(SERIAL_MCR, MCR_OUT2);
  outb(SERIAL_IER, IER_RECEIVED);
  serial_print("ready\n");
  sleep_until(&interrupts, 1);
}

static volatile uint8_t keyboard_byte;

static void serve_keyboard(struct frame *frame) {
  (void)frame;
  keyboard_byte = inb(KEYBOARD_DATA);
  interrupts++;
  end_of_interrupt(THROUGH_PIC, KEYBOARD_IRQ);
}

void test_keyboard(void) {
  listen(THROUGH_PIC, KEYBOARD_IRQ, false, serve_keyboard);
  outb(KEYBOARD_COMMAND, WRITE_COMMAND_BYTE);
  outb(KEYBOARD_DATA, COMMAND_BYTE_INTERRUPT);
  outb(KEYBOARD_COMMAND, SELF_TEST);
  sleep_until(&interrupts, 1);
  print_result("keyboard", keyboard_byte, "");
}

static void print_vector(struct frame *frame) {
  print_result("vector", frame->vector, "");
  interrupts++;
}

// N, `spin` or `hlt`: vectors that the host asks for, at the latest when the guest writes to the device.
void test_external(void) {
  unsigned wanted = next_number();
  bool halts = same(next_word(), "hlt");
  for (unsigned vector = FIRST_FREE_VECTOR; vector < VECTORS; vector++) handlers[vector] = print_vector;
  serial_print("closed\n");
  outb(DEVICE, 1);
  for (volatile int i = 0; i < SETTLE; i++) continue;
  serial_print("open\n");
  if (halts) {
    sleep_until(&interrupts, wanted);
  } else {
    enable_interrupts();
    while (interrupts < wanted) continue;
    disable_interrupts();
  }
}

static void print_message(struct frame *frame) {
  *lapic(LAPIC_EOI) = 0;
  print_vector(frame);
}

// N: vectors that the host sends to the local APIC.
void test_message(void) {
  unsigned wanted = next_number();
  for (unsigned vector = FIRST_FREE_VECTOR; vector < VECTORS; vector++) handlers[vector] = print_message;
  lapic_enable();
  serial_print("open\n");
  sleep_until(&interrupts, wanted);
}

static void count_nmi(struct frame *frame) {
  (void)frame;
  interrupts++;
}

// N: to itself, through the local APIC, with interrupts off.
void test_nmi(void) {
  unsigned wanted = next_number();
  handlers[NMI_VECTOR] = count_nmi;
  lapic_enable();
  for (unsigned sent = 1; sent <= wanted; sent++) {
    send_ipi(lapic_id(), IPI_NMI);
    while (interrupts < sent) continue;
  }
  print_result("nmi", interrupts, "");
}

// N: a halt before each.
void test_nmi_from_host(void) {
  unsigned wanted = next_number();
  handlers[NMI_VECTOR] = count_nmi;
  while (interrupts < wanted) {
    __asm__ volatile("hlt" ::: "memory");
    print_result("nmi", interrupts, "");
  }
}
