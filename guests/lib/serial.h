// The first serial port: a 16550 at 0x3f8, polled.
#pragma once

#include "ports.h"

enum {
  SERIAL_DATA = 0x3f8,     // read: the byte received (RBR); write: the byte to send (THR)
  SERIAL_STATUS = 0x3fd,   // line status register (LSR)
  STATUS_RECEIVED = 0x01,  // LSR.DR: a byte can be read
  STATUS_CAN_SEND = 0x20,  // LSR.THRE: a byte can be written
};

static inline char serial_read(void) {
  while (!(inb(SERIAL_STATUS) & STATUS_RECEIVED)) continue;
  return inb(SERIAL_DATA);
}

static inline void serial_write(char byte) {
  while (!(inb(SERIAL_STATUS) & STATUS_CAN_SEND)) continue;
  outb(SERIAL_DATA, byte);
}

static inline void serial_print(const char *text) {
  while (*text) serial_write(*text++);
}

// Prints 64 bits in hexadecimal.
static inline void serial_print_hex(uint64_t number) {
  for (int shift = 60; shift >= 0; shift -= 4) serial_write("0123456789abcdef"[number >> shift & 0xf]);
}

// Prints a number in decimal. (`unsigned long` is 64 bits in long mode, 32 in protected mode.)
static inline void serial_print_number(unsigned long number) {
  char digits[20];
  int count = 0;
  do digits[count++] = '0' + number % 10;
  while (number /= 10);
  while (count) serial_write(digits[--count]);
}
