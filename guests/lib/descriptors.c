// Descriptor tables: segments, the task state, and the vectors' handlers.

#include "descriptors.h"
#include "command-line.h"

struct table_pointer {
  uint16_t limit;
  uint64_t base;
} __attribute__((packed));

uint64_t gdt[GDT_SIZE / 8] = {
    [KERNEL_CODE / 8] = 0x00af9b000000ffff,
    [KERNEL_DATA / 8] = 0x00cf93000000ffff,
    [USER_DATA / 8] = 0x00cff3000000ffff,
    [USER_CODE / 8] = 0x00affb000000ffff,
    [KERNEL_CODE_32 / 8] = 0x00cf9b000000ffff,
    [NOT_PRESENT_DATA / 8] = 0x00cf13000000ffff,
};

handler *handlers[VECTORS];
struct gate idt[VECTORS];
extern const uint8_t stubs[];

void fill_gates(struct gate table[VECTORS], const uint8_t *first_stub) {
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

void load_task_state(const void *state, uint16_t limit) {
  uint64_t base = (uint64_t)state;
  // An available 64-bit TSS: `ltr` makes it a busy one, which it would not take again.
  gdt[TASK_STATE / 8] = 0x0000890000000000 | (base & 0xffffff) << 16 | (base >> 24 & 0xff) << 56 | limit;
  gdt[TASK_STATE / 8 + 1] = base >> 32;
  __asm__ volatile("ltr %w0" : : "r"(TASK_STATE) : "memory");
}

void load_idt_from(const struct gate table[VECTORS]) {
  struct table_pointer pointer = {VECTORS * sizeof *table - 1, (uint64_t)table};
  __asm__ volatile("lidt %0" : : "m"(pointer));
}

void load_idt(void) { load_idt_from(idt); }

void load_descriptors(void) {
  struct table_pointer pointer = {sizeof gdt - 1, (uint64_t)gdt};
  __asm__ volatile("lgdt %0" : : "m"(pointer));
  for (unsigned vector = 0; vector < VECTORS; vector++) handlers[vector] = unexpected;
  fill_gates(idt, stubs);
  load_idt();
}

void open_to_user(uint64_t address) {
  enum { USER = 1 << 2, ADDRESS = ~0xfff, LEVELS = 3, INDEX = 0x1ff, FIRST_SHIFT = 39, BITS = 9 };
  uint64_t cr3;
  __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
  uint64_t *table = (uint64_t *)(cr3 & ADDRESS);
  for (int level = 0; level < LEVELS; level++) {
    uint64_t *entry = &table[address >> (FIRST_SHIFT - level * BITS) & INDEX];
    *entry |= USER;  // must be set at every level; at the third, pages are of 2 MiB
    table = (uint64_t *)(*entry & ADDRESS);
  }
  __asm__ volatile("mov %0, %%cr3" : : "r"(cr3) : "memory");
}
