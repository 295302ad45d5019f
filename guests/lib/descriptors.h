// Descriptor tables of a long-mode kernel: segments, the task state, and the vectors' handlers.
#pragma once

// Selectors in the GDT of descriptors.c.
#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define TASK_STATE 0x18
#define USER_DATA 0x2b
#define USER_CODE 0x33
#define KERNEL_CODE_32 0x38
#define NOT_PRESENT_DATA 0x40
// Behind the last descriptor.
#define NO_SELECTOR 0x48
#define GDT_SIZE 0x48

#define VECTORS 256
#define STUB_SIZE 16

#ifndef __ASSEMBLER__
#include <stdint.h>

// What the stack has when a handler runs: what stubs.S pushed, then what the processor did.
struct frame {
  uint64_t r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
  uint64_t vector, error_code;
  uint64_t rip, cs, rflags, rsp, ss;
};

// Interrupt handlers by vector; interrupts are off while one runs.
typedef void handler(struct frame *);
extern handler *handlers[VECTORS];

struct gate {
  uint16_t offset_low, selector;
  uint16_t stack_and_type[2];  // the interrupt stack table's index is in the lowest bits of the first byte
  uint32_t offset_high, reserved;
};

enum { GATE_INTERRUPT = 0x8e00 };  // present, for CPL 0, a 64-bit interrupt gate

// Intel SDM vol. 3A, "Task Management in 64-bit Mode".
struct task_state {
  uint32_t reserved_0;
  uint64_t rsp[3];
  uint64_t reserved_1;
  uint64_t ist[7];
  uint64_t reserved_2;
  uint16_t reserved_3;
  uint16_t io_map_base;
} __attribute__((packed));

extern struct gate idt[VECTORS];

// The GDT, and the IDT, in which all vectors but those with a handler end the machine.
void load_descriptors(void);
void load_idt(void);
void load_idt_from(const struct gate table[VECTORS]);
// For the processor that calls it. One after the other: they share a place in the GDT, which is read just once.
void load_task_state(const void *state, uint16_t limit);
// Makes a gate for each of the stubs, see STUBS in stubs.h.
void fill_gates(struct gate table[VECTORS], const uint8_t *first_stub);
// Lets user mode (CPL 3) use the 2 MiB around an address.
void open_to_user(uint64_t address);
#endif
