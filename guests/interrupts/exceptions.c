// Takes every exception that software can raise, and returns from it.

#include "kernel.h"
#include "serial.h"

enum { DE, DB, BP = 3, OF, BR, UD, NM, TS = 10, NP, SS, GP, PF, MF = 16, AC, XM = 19, NONE = VECTORS };
enum { CR0_TS = 1 << 3, CR0_AM = 1 << 18 };
static const uint64_t NOT_MAPPED = 0x400000000000;

void attempt(void (*raise)(void));
void raise_db(void);
void raise_of(void);
void raise_br(void);
void raise_ac(void);
void raise_xm(void);
extern const uint8_t recover[], software_interrupts[];
extern uint64_t recovery_stack;

static volatile unsigned taken;
static volatile uint64_t error_code;

static void take(struct frame *frame) {
  taken = frame->vector;
  // Bit 0, EXT, tells whether another event was being delivered: processors disagree.
  error_code = frame->error_code & ~1ul;
  if (taken == PF) {
    uint64_t address;
    __asm__ volatile("mov %%cr2, %0" : "=r"(address));
    if (address != NOT_MAPPED) fail("page fault at", address);
  }
  if (taken == DB || taken == BP) {  // traps: the next instruction goes on
    frame->rflags &= ~(uint64_t)RFLAGS_TF;
    return;
  }
  frame->rip = (uint64_t)recover;
  frame->cs = KERNEL_CODE;
  frame->ss = KERNEL_DATA;
  frame->rsp = recovery_stack;
  frame->rflags &= ~(uint64_t)RFLAGS_AC;
}

static uint64_t read_cr0(void) {
  uint64_t value;
  __asm__ volatile("mov %%cr0, %0" : "=r"(value));
  return value;
}

static void write_cr0(uint64_t value) { __asm__ volatile("mov %0, %%cr0" : : "r"(value) : "memory"); }

static void raise_de(void) {
  uint32_t quotient = 1, remainder = 0;
  __asm__ volatile("div %2" : "+a"(quotient), "+d"(remainder) : "r"(0));
}

static void raise_bp(void) { __asm__ volatile("int3"); }
static void raise_ud(void) { __asm__ volatile("ud2"); }

static uint8_t fpu_state[512] __attribute__((aligned(16)));

static void raise_nm(void) {
  write_cr0(read_cr0() | CR0_TS);
  __asm__ volatile("movups %%xmm0, %0" : "=m"(fpu_state));
}
static void clean_nm(void) { __asm__ volatile("clts"); }

static void raise_ts(void) {
  break_stack_of(UD, true);
  __asm__ volatile("ud2");
}
static void clean_ts(void) { break_stack_of(UD, false); }

static void raise_np(void) { __asm__ volatile("mov %0, %%es" : : "r"(NOT_PRESENT_DATA)); }
static void raise_ss(void) { __asm__ volatile("mov %0, %%ss" : : "r"(NOT_PRESENT_DATA)); }
static void raise_gp(void) { __asm__ volatile("mov %0, %%es" : : "r"(NO_SELECTOR)); }
static void raise_pf(void) { *(volatile uint8_t *)NOT_MAPPED; }

// An FPU that has divided by zero, with that exception unmasked: the next instruction that waits for it
// faults. MMX instructions do so too, on processors; some emulators know that of one, some of the other.
static void raise_mf(void) {
  enum { FCW = 0, FSW = 2, MXCSR = 24 };
  *(uint16_t *)(fpu_state + FCW) = 0x037b;
  *(uint16_t *)(fpu_state + FSW) = 0x8084;
  *(uint32_t *)(fpu_state + MXCSR) = 0x1f80;
  __asm__ volatile("fxrstor %0; movq %0, %%mm0; fwait" : : "m"(fpu_state));
}
static void clean_mf(void) { __asm__ volatile("fninit"); }

static void raise_ac_in_user_mode(void) {
  open_to_user(0);
  write_cr0(read_cr0() | CR0_AM);
  raise_ac();
}
static void clean_ac(void) { write_cr0(read_cr0() & ~(uint64_t)CR0_AM); }

static void raise_xm_in_user_mode(void) {
  open_to_user(0);
  raise_xm();
}

static const struct {
  const char *name;
  unsigned vector;
  void (*raise)(void);
  void (*clean)(void);
} exceptions[] = {
    {"DE", DE, raise_de, 0},
    {"DB", DB, raise_db, 0},
    {"BP", BP, raise_bp, 0},
    {"OF", OF, raise_of, 0},
    {"BR", BR, raise_br, 0},
    {"UD", UD, raise_ud, 0},
    {"NM", NM, raise_nm, clean_nm},
    {"TS", TS, raise_ts, clean_ts},
    {"NP", NP, raise_np, 0},
    {"SS", SS, raise_ss, 0},
    {"GP", GP, raise_gp, 0},
    {"PF", PF, raise_pf, 0},
    {"MF", MF, raise_mf, clean_mf},
    {"AC", AC, raise_ac_in_user_mode, clean_ac},
    {"XM", XM, raise_xm_in_user_mode, 0},
};
enum { EXCEPTIONS = sizeof exceptions / sizeof *exceptions };

// Those that are named; all of them if none is.
static uint32_t chosen(void) {
  uint32_t chosen = 0;
  for (const char *word = next_word(); *word; word = next_word()) {
    for (int i = 0; i < EXCEPTIONS; i++) {
      if (same(word, exceptions[i].name)) chosen |= 1u << i;
    }
  }
  return chosen ? chosen : (1u << EXCEPTIONS) - 1;
}

static void print_error_code(uint64_t code) {
  static const char digits[] = "0123456789abcdef";
  char text[] = "(0x00)";
  text[3] = digits[code >> 4 & 0xf];
  text[4] = digits[code & 0xf];
  serial_print(text);
}

static bool has_error_code(unsigned vector) { return (vector >= TS && vector <= PF) || vector == AC; }

void test_exceptions(void) {
  uint32_t wanted = chosen();
  for (unsigned vector = 0; vector <= XM; vector++) handlers[vector] = take;
  serial_print("exceptions");
  for (int i = 0; i < EXCEPTIONS; i++) {
    if (!(wanted & 1u << i)) continue;
    taken = NONE;
    attempt(exceptions[i].raise);
    if (exceptions[i].clean) exceptions[i].clean();
    serial_print(" ");
    serial_print(exceptions[i].name);
    if (taken != exceptions[i].vector) {
      serial_print(" but ");
      fail("vector", taken);
    }
    if (has_error_code(taken)) print_error_code(error_code);
  }
  serial_print("\n");
}

static void take_and_go_on(struct frame *frame) { taken = frame->vector; }

// All 256 vectors with `int n`, or all but some, each of which goes on behind it.
void test_software_interrupts(void) {
  enum { FUNCTION_SIZE = 4 };
  static bool left_out[VECTORS];
  if (same(next_word(), "but")) {
    for (const char *word = next_word(); *word; word = next_word()) left_out[number_of(word) % VECTORS] = true;
  }
  unsigned count = 0;
  load_software_idt();
  for (unsigned vector = 0; vector < VECTORS; vector++) handlers[vector] = take_and_go_on;
  for (unsigned vector = 0; vector < VECTORS; vector++) {
    if (left_out[vector]) continue;
    taken = NONE;
    ((void (*)(void))(software_interrupts + vector * FUNCTION_SIZE))();
    if (taken != vector) fail("another vector than", vector);
    count++;
  }
  print_result("int", count, " vectors");
}
