// What the parts of this kernel share.
#pragma once

#include "command-line.h"
#include "controllers.h"
#include "processors.h"
#include "worker.h"

enum { BOOT_PROCESSOR = 0, TICK_VECTOR = LAPIC_BASE_VECTOR, PING, PONG, WAKE, STOP };

// --- main.c: what the command line chose
struct options {
  unsigned cpus, rounds, ticks;
  bool lapic_timer;  // instead of the PIT
  bool device;       // the host's, at port 0x500 and address 0xd0000000
  bool halt;         // end with `cli; hlt`
};
extern struct options options;
// Whether there are local APICs to look at.
bool has_lapic(void);
// How many other processors have started.
extern volatile unsigned started;

// --- state.c: what a processor has beside what programs use
// Sets it all, to values of that processor's own.
void set_state(unsigned id);
// Fails unless it is all as set.
void check_state(unsigned id);
// What CR2 has to be from now on.
void expect_cr2(unsigned id, uint64_t address);
// The bottom of a processor's stack, which nothing ever reaches.
uint64_t *stack_bottom(unsigned id);
// Which processor's stack that is on.
unsigned processor_of(const void *on_stack);

// --- calls.c: what a worker calls the kernel for
// Ends the machine with a failure: that is not as it was set.
__attribute__((noreturn)) void lost(const char *name, uint64_t is);
void listen_to_calls(void);
void listen_to_processors(void);

// --- ticks.c
void start_ticks(void);
// Sleeps until all of them were taken, and returns what they add to the answer.
uint64_t finish_ticks(void);
