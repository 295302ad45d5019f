// Tests of interrupts, timers and several processors: the command line says which.

#include "debug-exit.h"
#include "kernel.h"
#include "serial.h"

static const struct {
  const char *name;
  void (*run)(void);
} tests[] = {
    {"pit", test_pit},
    {"pit-ioapic", test_pit_ioapic},
    {"lapic", test_lapic_timer},
    {"rtc", test_rtc},
    {"level", test_level_ioapic},
    {"level-pic", test_level_pic},
    {"device", test_device_pic},
    {"device-ioapic", test_device_ioapic},
    {"serial", test_serial},
    {"keyboard", test_keyboard},
    {"storm", test_storm_pic},
    {"storm-ioapic", test_storm_ioapic},
    {"external", test_external},
    {"message", test_message},
    {"nmi", test_nmi},
    {"nmi-from-host", test_nmi_from_host},
    {"exceptions", test_exceptions},
    {"int", test_software_interrupts},
    {"smp", test_processors},
    {"sipi", test_startup_twice},
    {"crash", test_crash},
    {"halt", test_halt},
};

enum { WORD_SIZE = 16 };
static const char *rest_of_command_line;

const char *next_word(void) {
  static char word[WORD_SIZE];
  int length = 0;
  while (*rest_of_command_line == ' ') rest_of_command_line++;
  while (*rest_of_command_line && *rest_of_command_line != ' ') {
    if (length < WORD_SIZE - 1) word[length++] = *rest_of_command_line;
    rest_of_command_line++;
  }
  word[length] = 0;
  return word;
}

unsigned number_of(const char *word) {
  unsigned number = 0;
  for (; *word; word++) number = number * 10 + (*word - '0');
  return number;
}

unsigned next_number(void) { return number_of(next_word()); }

bool same(const char *left, const char *right) {
  while (*left && *left == *right) left++, right++;
  return *left == *right;
}

void print_result(const char *name, unsigned long count, const char *what) {
  serial_print(name);
  serial_print(" ");
  serial_print_number(count);
  serial_print(what);
  serial_print("\n");
}

void fail(const char *why, uint64_t number) {
  print_result(why, number, "");
  debug_exit(0);
}

void _start(uint64_t memory, const char *command_line) {
  (void)memory;
  rest_of_command_line = command_line;
  load_descriptors();
  const char *name = next_word();
  for (unsigned i = 0; i < sizeof tests / sizeof *tests; i++) {
    if (!same(name, tests[i].name)) continue;
    tests[i].run();
    debug_exit(EXIT_SUCCESS);
  }
  fail("no such test, of", sizeof tests / sizeof *tests);
}
