// What the tests of exceptions need: an IDT of its own for `int n`, and a task state that can be broken.

#include "kernel.h"

enum {
  UNREACHABLE_STACK = 1,  // IST1, which lies behind SHORT_LIMIT
  SHORT_LIMIT = 0x23,
};

static struct task_state task_state;
static struct gate software_idt[VECTORS];
static uint8_t stack_for_user_mode[4096] __attribute__((aligned(16)));
extern const uint8_t software_stubs[];

void load_software_idt(void) {
  fill_gates(software_idt, software_stubs);
  load_idt_from(software_idt);
}

void load_task(void) {
  task_state.rsp[0] = (uint64_t)stack_for_user_mode + sizeof stack_for_user_mode;
  task_state.io_map_base = sizeof task_state;
  load_task_state(&task_state, sizeof task_state - 1);
}

void break_stack_of(unsigned vector, bool broken) {
  idt[vector].stack_and_type[0] = GATE_INTERRUPT | (broken ? UNREACHABLE_STACK : 0);
  load_task_state(&task_state, broken ? SHORT_LIMIT : sizeof task_state - 1);
}
