// Descriptor tables: segments, the task state, and the vectors' handlers.

#include "kernel.h"

enum {
  STUB_SIZE = 16,
  GATE_INTERRUPT = 0x8e00,  // present, for CPL 0, a 64-bit interrupt gate
  UNREACHABLE_STACK = 1,    // IST1, which lies behind SHORT_LIMIT
  SHORT_LIMIT = 0x23,
};

struct gate {
  uint16_t offset_low, selector;
  uint16_t stack_and_type[2];  // the interrupt stack table's index is in the lowest bits of the first byte
  uint32_t offset_high, reserved;
};

struct table_pointer {
  uint16_t limit;
  uint64_t base;
} __attribute__((packed));

// Intel SDM vol. 3A, "Task Management in 64-bit Mode".
static struct {
  uint32_t reserved_0;
  uint64_t rsp[3];
  uint64_t reserved_1;
  uint64_t ist[7];
  uint64_t reserved_2;
  uint16_t reserved_3;
  uint16_t io_map_base;
} __attribute__((packed)) task_state;

uint64_t gdt[GDT_SIZE / 8] = {
    [KERNEL_CODE / 8] = 0x00af9b000000ffff,
    [KERNEL_DATA / 8] = 0x00cf93000000ffff,
    [USER_DATA / 8] = 0x00cff3000000ffff,
    [USER_CODE / 8] = 0x00affb000000ffff,
    [KERNEL_CODE_32 / 8] = 0x00cf9b000000ffff,
    [NOT_PRESENT_DATA / 8] = 0x00cf13000000ffff,
};

handler *handlers[VECTORS];
static struct gate idt[VECTORS], software_idt[VECTORS];
static uint8_t stack_for_user_mode[4096] __attribute__((aligned(16)));
extern const uint8_t stubs[], software_stubs[];

static void fill(struct gate *table, const uint8_t *first_stub) {
  for (unsigned vector = 0; vector < VECTORS; vector++) {
    uint64_t offset = (uint64_t)first_stub + vector * STUB_SIZE;
    table[vector] = (struct gate){
        .offset_low = offset,
        .selector = KERNEL_CODE,
        .stack_and_type = {GATE_INTERRUPT, offset >> 16},
        .offset_high = offset >> 32,
    };
  }
}

static void unexpected(struct frame *frame) { fail("unexpected vector", frame->vector); }

static void load_task_state(uint16_t limit) {
  uint64_t base = (uint64_t)&task_state;
  // An available 64-bit TSS: `ltr` makes it a busy one, which it would not take again.
  gdt[TASK_STATE / 8] = 0x0000890000000000 | (base & 0xffffff) << 16 | (base >> 24 & 0xff) << 56 | limit;
  gdt[TASK_STATE / 8 + 1] = base >> 32;
  __asm__ volatile("ltr %w0" : : "r"(TASK_STATE) : "memory");
}

void load_idt(void) {
  struct table_pointer pointer = {sizeof idt - 1, (uint64_t)idt};
  __asm__ volatile("lidt %0" : : "m"(pointer));
}

void load_software_idt(void) {
  struct table_pointer pointer = {sizeof software_idt - 1, (uint64_t)software_idt};
  __asm__ volatile("lidt %0" : : "m"(pointer));
}

void load_descriptors(void) {
  struct table_pointer pointer = {sizeof gdt - 1, (uint64_t)gdt};
  __asm__ volatile("lgdt %0" : : "m"(pointer));
  task_state.rsp[0] = (uint64_t)stack_for_user_mode + sizeof stack_for_user_mode;
  task_state.io_map_base = sizeof task_state;
  load_task_state(sizeof task_state - 1);
  for (unsigned vector = 0; vector < VECTORS; vector++) handlers[vector] = unexpected;
  fill(idt, stubs);
  fill(software_idt, software_stubs);
  load_idt();
}

void break_stack_of(unsigned vector, bool broken) {
  idt[vector].stack_and_type[0] = GATE_INTERRUPT | (broken ? UNREACHABLE_STACK : 0);
  load_task_state(broken ? SHORT_LIMIT : sizeof task_state - 1);
}

void open_memory_to_user(void) {
  enum { USER = 1 << 2, ADDRESS = ~0xfff, LEVELS = 3 };
  uint64_t cr3;
  __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
  uint64_t *table = (uint64_t *)(cr3 & ADDRESS);
  for (int level = 0; level < LEVELS; level++) {
    *table |= USER;  // the first entry: pages of 2 MiB at the third level
    table = (uint64_t *)(*table & ADDRESS);
  }
  __asm__ volatile("mov %0, %%cr3" : : "r"(cr3) : "memory");
}
