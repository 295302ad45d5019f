// Several processors: INIT and SIPI, a spin lock, interprocessor interrupts. The first argument is how many
// there are.

#include "kernel.h"
#include "serial.h"

enum {
  PING = LAPIC_BASE_VECTOR,
  PONG,
  BROADCAST,
  BOOT_PROCESSOR = 0,
  INCREMENTS = 100,
  HEARTBEATS = 1000,
};

static void (*job)(unsigned id);
static volatile unsigned up, pongs, broadcasts, counter, heartbeats;
static volatile bool lock;

static void increment(volatile unsigned *number) { __atomic_add_fetch(number, 1, __ATOMIC_SEQ_CST); }

static void wait_for(const volatile unsigned *number, unsigned wanted) {
  while (*number < wanted) __builtin_ia32_pause();
}

void processor_main(unsigned id) {
  load_idt();
  lapic_enable();
  job(id);
  for (;;) __asm__ volatile("sti; hlt");
}

static unsigned start_all(void (*what)(unsigned id)) {
  unsigned processors = next_number();
  if (processors < 1 || processors > MAX_PROCESSORS) fail("too many processors:", processors);
  job = what;
  lapic_enable();
  for (unsigned id = 1; id < processors; id++) start_processor(id);
  return processors;
}

// Without the lock increments would be lost: a read and a write are two instructions.
static void count(void) {
  for (int i = 0; i < INCREMENTS; i++) {
    while (__atomic_exchange_n(&lock, true, __ATOMIC_ACQUIRE)) __builtin_ia32_pause();
    unsigned value = counter;
    counter = value + 1;
    __atomic_store_n(&lock, false, __ATOMIC_RELEASE);
  }
}

static volatile unsigned counted;

static void count_with_others(unsigned id) {
  (void)id;
  increment(&up);
  count();
  increment(&counted);
}

static void answer(struct frame *frame) {
  (void)frame;
  *lapic(LAPIC_EOI) = 0;
  send_ipi(BOOT_PROCESSOR, IPI_FIXED | PONG);
}

static void take_pong(struct frame *frame) {
  (void)frame;
  pongs++;
  *lapic(LAPIC_EOI) = 0;
}

static void take_broadcast(struct frame *frame) {
  (void)frame;
  increment(&broadcasts);
  *lapic(LAPIC_EOI) = 0;
}

void test_processors(void) {
  handlers[PING] = answer;
  handlers[PONG] = take_pong;
  handlers[BROADCAST] = take_broadcast;
  unsigned processors = start_all(count_with_others), others = processors - 1;
  count();
  wait_for(&up, others);
  print_result("up", up + 1, "");
  wait_for(&counted, others);
  print_result("count", counter, "");
  for (unsigned id = 1; id < processors; id++) {
    send_ipi(id, IPI_FIXED | PING);
    sleep_until(&pongs, id);
  }
  print_result("ipis", pongs, "");
  if (others > 0) send_ipi(0, IPI_FIXED | IPI_TO_OTHERS | BROADCAST);
  wait_for(&broadcasts, others);
  print_result("broadcast", broadcasts, "");
}

static void beat(unsigned id) {
  (void)id;
  increment(&up);
  for (;;) increment(&heartbeats);
}

// A second SIPI means nothing to a processor that runs.
void test_startup_twice(void) {
  start_all(beat);
  wait_for(&heartbeats, HEARTBEATS);
  send_startup(1);
  wait_for(&heartbeats, heartbeats + HEARTBEATS);
  print_result("starts", up, "");
}

static unsigned victim;

static void crash_if_chosen(unsigned id) {
  increment(&up);
  if (id != victim) return;
  struct {
    uint16_t limit;
    uint64_t base;
  } __attribute__((packed)) nothing = {0, 0};
  __asm__ volatile("lidt %0; ud2" : : "m"(nothing));
}

// N, ID: a processor without an interrupt table meets an invalid instruction.
void test_crash(void) {
  const unsigned processors = next_number();
  victim = next_number();
  job = crash_if_chosen;
  lapic_enable();
  for (unsigned id = 1; id < processors; id++) {
    // The last one comes when the others are there.
    if (id != victim) start_processor(id);
  }
  wait_for(&up, processors - 2);
  print_result("crash", victim, "");
  start_processor(victim);
  for (;;) __asm__ volatile("sti; hlt");
}

static void halt_for_good(unsigned id) {
  (void)id;
  increment(&up);
  for (;;) __asm__ volatile("cli; hlt");
}

void test_halt(void) {
  unsigned processors = start_all(halt_for_good);
  wait_for(&up, processors - 1);
  print_result("halt", processors, "");
  halt_for_good(BOOT_PROCESSOR);
}
