// What the parts of this kernel share.
#pragma once

#define MAX_PROCESSORS 64
// Bytes of each one's stack: 4 KiB.
#define PROCESSOR_STACK_SHIFT 12

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

#ifndef __ASSEMBLER__
#include <stdbool.h>
#include <stdint.h>

// What the stack has when a handler runs: what stubs.S pushed, then what the processor did.
struct frame {
  uint64_t r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
  uint64_t vector, error_code;
  uint64_t rip, cs, rflags, rsp, ss;
};

enum { VECTORS = 256, RFLAGS_TF = 1 << 8, RFLAGS_AC = 1 << 18 };

// Interrupt handlers by vector; interrupts are off while one runs.
typedef void handler(struct frame *);
extern handler *handlers[VECTORS];

// --- descriptors.c
void load_descriptors(void);
// The IDT whose entries expect no error code, as `int n` pushes none; and the usual one.
void load_software_idt(void);
void load_idt(void);
// Gives a vector a stack that the task state segment has no room for, or takes that back.
void break_stack_of(unsigned vector, bool broken);
// Lets user mode (CPL 3) use the first 2 MiB.
void open_memory_to_user(void);
// Ends the machine with a failure.
__attribute__((noreturn)) void fail(const char *why, uint64_t number);

// --- controllers.c
enum { PIC_BASE = 0x20, LAPIC_BASE_VECTOR = 0x40, IOAPIC_BASE = 0x50, SPURIOUS_VECTOR = 0xff };
enum {
  IPI_FIXED = 0x4000,
  IPI_NMI = 0x4400,
  IPI_INIT = 0x4500,
  IPI_STARTUP = 0x4600,
  IPI_TO_OTHERS = 0xc0000,
};
enum {
  LAPIC_ID = 0x20,
  LAPIC_EOI = 0xb0,
  LAPIC_SVR = 0xf0,
  LAPIC_ICR_LOW = 0x300,
  LAPIC_ICR_HIGH = 0x310,
  LAPIC_LVT_TIMER = 0x320,
  LAPIC_TIMER_INITIAL = 0x380,
  LAPIC_TIMER_CURRENT = 0x390,
  LAPIC_TIMER_DIVIDE = 0x3e0,
};
static inline volatile uint32_t *lapic(unsigned offset) {
  return (volatile uint32_t *)(uint64_t)(0xfee00000u + offset);
}
void lapic_enable(void);
unsigned lapic_id(void);
void send_ipi(unsigned id, uint32_t command);

// The way an IRQ takes to the processor.
enum route { THROUGH_PIC, THROUGH_IOAPIC };
// Masks all inputs of both controllers but this one, which calls `handle`.
void listen(enum route route, unsigned irq, bool level, handler *handle);
void mask(enum route route, unsigned irq);
void end_of_interrupt(enum route route, unsigned irq);

// --- main.c: the words of the command line
const char *next_word(void);
unsigned number_of(const char *word);
unsigned next_number(void);
bool same(const char *left, const char *right);
void print_result(const char *name, unsigned long count, const char *what);

// --- the tests
void test_pit(void);
void test_pit_ioapic(void);
void test_lapic_timer(void);
void test_rtc(void);
void test_level_pic(void);
void test_level_ioapic(void);
void test_device_pic(void);
void test_device_ioapic(void);
void test_serial(void);
void test_keyboard(void);
void test_storm_pic(void);
void test_storm_ioapic(void);
void test_external(void);
void test_message(void);
void test_nmi(void);
void test_nmi_from_host(void);
void test_exceptions(void);
void test_software_interrupts(void);
void test_processors(void);
void test_startup_twice(void);
void test_crash(void);
void test_halt(void);

static inline void disable_interrupts(void) { __asm__ volatile("cli" ::: "memory"); }
static inline void enable_interrupts(void) { __asm__ volatile("sti" ::: "memory"); }

// Sleeps until there have been that many: `sti` lets interrupts in only behind `hlt`, so none is missed.
static inline void sleep_until(const volatile unsigned *count, unsigned wanted) {
  disable_interrupts();
  while (*count < wanted) __asm__ volatile("sti; hlt; cli" ::: "memory");
}
#endif
