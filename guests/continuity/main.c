// Notices any interruption: computes a hash over all that a snapshot of a machine has to keep.

#include "kernel.h"
#include "serial.h"

enum {
  DEVICE_PORTS = 8,
  LARGE_PAGE_SIZE = 0x200000,
  RFLAGS_IF = 1 << 9,
  RFLAGS_RESERVED = 1 << 1,
};

struct options options = {.cpus = 1, .rounds = 500};
volatile unsigned started;
extern const uint8_t image_end[];

static struct {
  struct task_state state;
  // The processor reads two bytes at a time: one more, all ones.
  uint8_t io_map[(DEVICE_PORT + DEVICE_PORTS) / 8 + 1];
} __attribute__((packed)) tasks[MAX_WORKERS];

bool has_lapic(void) { return options.cpus > 1 || options.ticks > 0; }

static const char *value_of(const char *word, const char *name) {
  while (*name && *word == *name) word++, name++;
  return *name ? 0 : word;
}

static void read_command_line(void) {
  for (const char *word = next_word(), *value; *word; word = next_word()) {
    if ((value = value_of(word, "cpus="))) options.cpus = number_of(value);
    else if ((value = value_of(word, "rounds="))) options.rounds = number_of(value);
    else if ((value = value_of(word, "ticks="))) options.ticks = number_of(value);
    else if ((value = value_of(word, "timer="))) options.lapic_timer = same(value, "lapic");
    else if ((value = value_of(word, "device="))) options.device = same(value, "1");
    else if ((value = value_of(word, "halt="))) options.halt = same(value, "1");
  }
  if (options.cpus < 1 || options.cpus > MAX_WORKERS) fail("expected cpus=1 to 8 but got", options.cpus);
}

static void load_task(unsigned id) {
  struct task_state *state = &tasks[id].state;
  state->rsp[0] = (uint64_t)stack_bottom(id + 1);
  state->io_map_base = sizeof *state;
  bool has_device = id == BOOT_PROCESSOR && options.device;
  for (unsigned i = 0; i < sizeof tasks[id].io_map; i++) {
    tasks[id].io_map[i] = has_device && i == DEVICE_PORT / 8 ? 0 : 0xff;
  }
  load_task_state(state, sizeof tasks[id] - 1);
}

// iretq takes five words from the stack, and with them the new privilege level.
__attribute__((noreturn)) static void run_worker(unsigned id) {
  uint64_t flags = RFLAGS_RESERVED | (has_lapic() ? RFLAGS_IF : 0);
  uint64_t stack = (uint64_t)user_stacks[id + 1] - 8;  // a function starts with rsp 8 below a multiple of 16
  __asm__ volatile(
      "mov %0, %%ds; mov %0, %%es\n\t"
      "push %q0; push %1; push %2; push %3; push %4; iretq"
      :
      : "r"(USER_DATA), "r"(stack), "r"(flags), "i"(USER_CODE), "r"(user_main), "D"(&workers[id])
      : "memory");
  __builtin_unreachable();
}

void processor_main(unsigned id) {
  load_idt();
  load_task(id);
  set_state(id);
  started = id;
  send_ipi(BOOT_PROCESSOR, IPI_FIXED | WAKE);
  run_worker(id);
}

void _start(uint64_t memory, const char *command_line) {
  (void)memory;
  set_command_line(command_line ? command_line : "");
  read_command_line();
  load_descriptors();
  load_task(BOOT_PROCESSOR);
  for (uint64_t page = 0; page < (uint64_t)image_end; page += LARGE_PAGE_SIZE) open_to_user(page);
  if (options.device) open_to_user(DEVICE_MEMORY);
  if (has_lapic()) pic_init();  // nobody says what it does when the kernel starts
  listen_to_calls();
  listen_to_processors();
  set_state(BOOT_PROCESSOR);
  serial_print("continuity: started\n");
  for (unsigned id = 1; id < options.cpus; id++) {
    start_processor(id);
    sleep_until(&started, id);
  }
  if (options.ticks > 0) start_ticks();
  run_worker(BOOT_PROCESSOR);
}
