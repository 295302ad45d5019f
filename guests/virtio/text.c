// Text for the serial port.

#include "debug-exit.h"
#include "kernel.h"
#include "serial.h"

#include <stdarg.h>

enum { EXIT_FAILURE = 1 };

static void print_hex(uint64_t number) {
  int shift = 60;
  serial_print("0x");
  while (shift && !(number >> shift)) shift -= 4;
  for (; shift >= 0; shift -= 4) serial_write("0123456789abcdef"[number >> shift & 15]);
}

static void print_format(const char *format, va_list arguments) {
  for (; *format; format++) {
    if (*format != '%') {
      serial_write(*format);
      continue;
    }
    bool is_long = *++format == 'l';
    if (is_long) format++;
    if (*format == 's') serial_print(va_arg(arguments, const char *));
    else if (*format == 'x') print_hex(va_arg(arguments, unsigned long));
    else serial_print_number(is_long ? va_arg(arguments, unsigned long) : va_arg(arguments, unsigned));
  }
}

void print_text(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print_format(format, arguments);
  va_end(arguments);
}

void print_line(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print_format(format, arguments);
  va_end(arguments);
  serial_print("\n");
}

void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  serial_print("FAILED: ");
  print_format(format, arguments);
  va_end(arguments);
  serial_print("\n");
  debug_exit(EXIT_FAILURE);
}

void expect(const char *what, uint64_t expected, uint64_t got) {
  if (expected != got) fail("%s expected %lu got %lu", what, expected, got);
}

// The compiler calls these for large structures, C library or not.
void *memcpy(void *to, const void *from, size_t length) {
  copy_bytes(to, from, length);
  return to;
}

void *memset(void *to, int value, size_t length) {
  fill_bytes(to, value, length);
  return to;
}
