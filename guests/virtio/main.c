// Drivers for virtio devices, and their tests: the command line says which.

#include "debug-exit.h"
#include "drivers.h"
#include "virtqueue.h"

struct options options;

static const struct {
  const char *name;
  uint32_t device_id;
  test *run;
  bool on_all_devices;  // of that type; and whether or not it was asked for, if no word asks for anything
  uint64_t defaults[MAX_ARGUMENTS];
} tests[] = {
    {"entropy", ENTROPY_SOURCE, entropy_test, true, {0}},
    {"block", BLOCK_DEVICE, block_test, true, {0}},
    {"console", CONSOLE, console_test, true, {0}},
    {"echo", CONSOLE, console_echo, false, {0}},
    {"bench-block-seq", BLOCK_DEVICE, block_bench_sequential, false, {256, 8}},
    {"bench-block-rand", BLOCK_DEVICE, block_bench_random, false, {1000, 8}},
    {"bench-console", CONSOLE, console_bench, false, {1 << 20, 64 << 10, 1}},
    {"bench-doorbell", ENTROPY_SOURCE, entropy_bench_doorbell, false, {1000}},
};

static bool set_option(const struct word *word) {
  uint64_t numbers[MAX_ARGUMENTS];
  if (word_is(word, "irq")) return options.irq = true;
  if (word_is(word, "verbose")) return options.verbose = true;
  if (word_is(word, "no-indirect")) return options.no_indirect = true;
  if (word_is(word, "no-event-idx")) return options.no_event_idx = true;
  if (!word_is(word, "ports")) return false;
  expect("arguments of ports", 1, parse_arguments(word, numbers));
  options.ports = numbers[0];
  return true;
}

// Resets all devices, so that the tests behind it start them anew.
static void reset_devices(void) {
  for (unsigned i = 0; i < device_count; i++) virtio_mmio_reset(&devices[i]);
  virtqueue_free_all();
}

// Runs a test with the devices of its type; returns with how many.
static unsigned run(unsigned index, const uint64_t *arguments) {
  unsigned count = 0;
  for (unsigned i = 0; i < device_count; i++) {
    if (devices[i].device_id != tests[index].device_id) continue;
    tests[index].run(&devices[i], arguments);
    count++;
    if (!tests[index].on_all_devices) break;
  }
  return count;
}

static void run_word(const struct word *word) {
  if (word_is(word, "reset")) {
    reset_devices();
    return;
  }
  uint64_t arguments[MAX_ARGUMENTS], given[MAX_ARGUMENTS];
  for (unsigned i = 0; i < COUNT(tests); i++) {
    if (!word_is(word, tests[i].name)) continue;
    copy_bytes(arguments, tests[i].defaults, sizeof arguments);
    copy_bytes(arguments, given, parse_arguments(word, given) * sizeof *given);
    if (run(i, arguments)) return;
    fail("a device of type %u expected for %s got none", tests[i].device_id, tests[i].name);
  }
  fail("a word of guests/virtio/README.md expected got %s", word->text);
}

void main(const char *command_line) {
  struct word word;
  bool chosen = false;
  // First the options, which hold for all words, before them or behind.
  for (const char *at = command_line; next_word(at, &word); at = word.rest) set_option(&word);
  init_interrupts();
  for (const char *at = command_line; next_word(at, &word); at = word.rest) {
    if (word_is(&word, "virtio_mmio.device") && word.arguments) virtio_mmio_add(word.arguments);
  }
  if (!device_count) fail("virtio_mmio.device= expected on the command line got %s", command_line);
  for (const char *at = command_line; next_word(at, &word); at = word.rest) {
    if (word_is(&word, "virtio_mmio.device") || set_option(&word)) continue;
    run_word(&word);
    chosen = true;
  }
  for (unsigned i = 0; !chosen && i < COUNT(tests); i++) {
    if (tests[i].on_all_devices) run(i, tests[i].defaults);
  }
  print_line("done");
  debug_exit(EXIT_SUCCESS);
}
