// What workers call the kernel for, by exceptions, and what processors tell each other.

#include "kernel.h"
#include "debug-exit.h"
#include "serial.h"

enum { UD = 6, PF = 14, PF_USER_READS = 4 };

static volatile unsigned pongs, finished;
static volatile unsigned pings[MAX_WORKERS];
static uint64_t others_sum;

void lost(const char *name, uint64_t is) {
  serial_print("lost ");
  serial_print(name);
  serial_print(": ");
  serial_print_hex(is);
  serial_print("\n");
  debug_exit(0);
}

// One after the other: two of the same vector, and a local APIC may deliver one.
static void ping_others(void) {
  for (unsigned id = 1; id < options.cpus; id++) {
    const unsigned wanted = pongs + 1;
    send_ipi(id, IPI_FIXED | PING);
    sleep_until(&pongs, wanted);
  }
}

static void answer_ping(struct frame *frame) {
  unsigned id = processor_of(frame);
  pings[id]++;
  check_state(id);
  *lapic(LAPIC_EOI) = 0;
  send_ipi(BOOT_PROCESSOR, IPI_FIXED | PONG);
}

static void take_pong(struct frame *frame) {
  (void)frame;
  pongs++;
  *lapic(LAPIC_EOI) = 0;
}

static void wake(struct frame *frame) {
  (void)frame;
  *lapic(LAPIC_EOI) = 0;
}

__attribute__((noreturn)) static void halt(void) {
  for (;;) __asm__ volatile("cli; hlt");
}

static void stop(struct frame *frame) {
  (void)frame;
  halt();
}

__attribute__((noreturn)) static void finish_other(uint64_t hash) {
  __atomic_add_fetch(&others_sum, hash, __ATOMIC_SEQ_CST);
  __atomic_add_fetch(&finished, 1, __ATOMIC_SEQ_CST);
  send_ipi(BOOT_PROCESSOR, IPI_FIXED | WAKE);
  for (;;) __asm__ volatile("sti; hlt");
}

__attribute__((noreturn)) static void finish(uint64_t hash) {
  hash = mix(hash, finish_ticks());
  sleep_until(&finished, options.cpus - 1);
  check_state(BOOT_PROCESSOR);
  hash = mix(hash, others_sum);
  hash = mix(hash, shared_sum);
  hash = mix(hash, pongs);
  for (unsigned id = 1; id < options.cpus; id++) hash = mix(hash, pings[id]);
  serial_print("hash ");
  serial_print_hex(hash);
  serial_print("\n");
  if (!options.halt) debug_exit(EXIT_SUCCESS);
  if (options.cpus > 1) send_ipi(0, IPI_FIXED | IPI_TO_OTHERS | STOP);
  halt();
}

static void take_call(struct frame *frame) {
  unsigned id = processor_of(frame);
  if (*(const uint16_t *)frame->rip != UD2) fail("invalid instruction at", frame->rip);
  frame->rip += UD2_SIZE;
  switch (frame->rax) {
    case CALL_CHECK: check_state(id); return;
    case CALL_PROGRESS: print_result("progress", frame->rdi, ""); return;
    case CALL_PING: ping_others(); return;
    case CALL_FINISH: id == BOOT_PROCESSOR ? finish(frame->rdi) : finish_other(frame->rdi);
    case CALL_LOST: lost((const char *)frame->rdi, id);
    default: fail("no such call:", frame->rax);
  }
}

static void take_page_fault(struct frame *frame) {
  uint64_t address;
  __asm__ volatile("mov %%cr2, %0" : "=r"(address));
  if (address != frame->rax || frame->error_code != PF_USER_READS) fail("page fault at", address);
  expect_cr2(processor_of(frame), address);
  frame->rip += TOUCH_SIZE;
}

void listen_to_calls(void) {
  handlers[UD] = take_call;
  handlers[PF] = take_page_fault;
}

void listen_to_processors(void) {
  handlers[PING] = answer_ping;
  handlers[PONG] = take_pong;
  handlers[WAKE] = wake;
  handlers[STOP] = stop;
}
