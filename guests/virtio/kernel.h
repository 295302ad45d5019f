// What the parts of this kernel share.
#pragma once

// Selectors in the GDT of entry.S.
#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10

// Exceptions, then the I/O APIC's inputs, then the spurious interrupt.
#define VECTORS 64
#define STUB_SIZE 16

#ifndef __ASSEMBLER__
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

// --- main.c: what the command line chose
struct options {
  bool irq;           // wait for interrupts; otherwise look at the used rings until something is there
  bool verbose;       // print what differs between hosts, too
  bool no_indirect;   // do not accept VIRTIO_F_INDIRECT_DESC
  bool no_event_idx;  // do not accept VIRTIO_F_EVENT_IDX
  unsigned ports;     // how many of a console's ports the host opens; 0: whatever it has opened shortly
};
extern struct options options;

// --- words.c: the words of the command line
enum { MAX_ARGUMENTS = 3 };
struct word {
  const char *text, *end;  // the word, up to `=` if it has arguments
  const char *arguments;   // behind `=`, or 0
  const char *rest;        // what follows
};
// Finds the next word; false at the end of the line.
bool next_word(const char *line, struct word *word);
bool word_is(const struct word *word, const char *name);
// A number as Linux' memparse() reads it: 0x for hexadecimal; K, M or G behind it. Moves `text` behind it.
bool parse_number(const char **text, uint64_t *number);
// The arguments, numbers with commas between them. Returns how many there are.
unsigned parse_arguments(const struct word *word, uint64_t numbers[MAX_ARGUMENTS]);

// --- text.c: the serial port
// As `printf`, but these alone: %s, %u, %lu, and %lx, which writes 0x first.
__attribute__((format(printf, 1, 2))) void print_text(const char *format, ...);
// The same, then a line feed.
__attribute__((format(printf, 1, 2))) void print_line(const char *format, ...);
// The same behind FAILED, and the end of the machine.
__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...);
// Fails unless the two are equal.
void expect(const char *what, uint64_t expected, uint64_t got);

// --- interrupts.c
enum { IOAPIC_PINS = 24 };
void init_interrupts(void);
// Lets an input of the I/O APIC interrupt the processor. Its handler asks the devices (virtio-mmio.c).
void open_interrupt(unsigned irq);

// Interrupts are off but for this moment: `sti` lets them in only behind `hlt`, so none before it is missed.
static inline void sleep_until_interrupt(void) { __asm__ volatile("sti; hlt; cli" ::: "memory"); }

// Waits a moment for what a device changes in memory.
static inline void relax(void) {
  if (options.irq) sleep_until_interrupt();
  else __asm__ volatile("pause" ::: "memory");
}

static inline uint64_t cycles(void) {
  uint32_t low, high;
  __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
  return (uint64_t)high << 32 | low;
}

// String instructions: one instruction for any length, which counts where kernel code is emulated.
static inline void copy_bytes(void *to, const void *from, size_t length) {
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length)::"memory");
}

static inline void fill_bytes(void *to, uint8_t value, size_t length) {
  __asm__ volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(value) : "memory");
}

static inline bool same_bytes(const void *left, const void *right, size_t length) {
  bool same;
  // The comparison first: with a length of 0 no iteration would set the flag.
  __asm__ volatile("cmp %%rcx, %%rcx; repe cmpsb"
                   : "=@cce"(same), "+S"(left), "+D"(right), "+c"(length)::"memory");
  return same;
}
#endif
