// Tests of interrupts, timers and several processors: the command line says which.

#include "debug-exit.h"
#include "kernel.h"

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

void _start(uint64_t memory, const char *command_line) {
  (void)memory;
  set_command_line(command_line);
  load_descriptors();
  load_task();
  const char *name = next_word();
  for (unsigned i = 0; i < sizeof tests / sizeof *tests; i++) {
    if (!same(name, tests[i].name)) continue;
    tests[i].run();
    debug_exit(EXIT_SUCCESS);
  }
  fail("no such test, of", sizeof tests / sizeof *tests);
}
