// What a processor has beside the registers of programs. It is set once, and then looked at again and again.

#include "kernel.h"
#include "ports.h"

enum {
  EFER = 0xc0000080,
  EFER_SCE = 1 << 0,
  FS_BASE = 0xc0000100,
  GS_BASE = 0xc0000101,
  TSC_AUX = 0xc0000103,
  CR0_MP = 1 << 1,
  CR4_DE = 1 << 3,
  CR4_OSFXSR = 1 << 9,
  CR4_OSXMMEXCPT = 1 << 10,
  CR4_OSXSAVE = 1 << 18,
  CPUID_1_ECX_AVX = 1 << 28 | 1 << 26,  // and XSAVE
  CPUID_80000001_EDX_RDTSCP = 1 << 27,
  CPUID_XSAVE = 0xd,
  XSAVE_SIZE = 512 + 64 + 256,  // with AVX enabled
  // Four breakpoints on writes, of 1, 2, 8 and 4 bytes, none of them enabled.
  DR7 = 0xd9510400,
  // Breakpoints 0 and 2 were met.
  DR6 = 0xffff0ff5,
  TASK_PRIORITY = 0x10,
  LAPIC_ID_SHIFT = 24,
  LVT_EXTERNAL = 0x700,  // the PIC's interrupt, with the vector that the PIC gives
  SERIAL_SCRATCH = 0x3ff,
  SCRATCH = 0xa5,
};

static const struct {
  uint32_t index;
  const char *name;
  uint64_t value;
  uint64_t step;  // what each processor has more than the one before
} msrs[] = {
    {FS_BASE, "FS base", (uint64_t)&workers[0].fs_word, sizeof *workers},
    {GS_BASE, "GS base", (uint64_t)&workers[0].gs_word, sizeof *workers},
    {0xc0000102, "kernel GS base", 0xffff800000abc000, 0x1000},
    {0xc0000081, "STAR", 0x0023001012345678, 0x10},
    {0xc0000082, "LSTAR", 0xffff800000123000, 0x1000},
    {0xc0000083, "CSTAR", 0xffff800000456000, 0x1000},
    {0xc0000084, "SFMASK", 0x47700, 0},
    // Of the next two KVM on AMD-V keeps 32 bits when they are set from outside.
    {0x174, "SYSENTER_CS", 0x1230, 0x10},
    {0x175, "SYSENTER_ESP", 0x789000, 0x1000},
    {0x176, "SYSENTER_EIP", 0x7ab000, 0x1000},
    // The first four as they are at a reset: page tables choose no others here.
    {0x277, "PAT", 0x0001050600070406, 0},
    // A range that is not enabled.
    {0x20e, "MTRR base 7", 0xabc00006, 0},
    {0x20f, "MTRR mask 7", 0xfff00000, 0},
};
enum { MSRS = sizeof msrs / sizeof *msrs };

static const uint64_t DEBUG_ADDRESS = 0x1122334400, CANARY = 0x0ddba11c0ffee;
static const uint32_t TSC_AUX_VALUE = 0x12345670;

static struct state {
  uint64_t cr0, cr2, cr3, cr4, efer;
  uint32_t xsave_size;
  uint32_t svr, ldr, lint0;
} states[MAX_WORKERS];

static uint64_t read_msr(uint32_t index) {
  uint32_t low, high;
  __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
  return (uint64_t)high << 32 | low;
}

static void write_msr(uint32_t index, uint64_t value) {
  __asm__ volatile("wrmsr" : : "c"(index), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

#define READ(name)                                        \
  ({                                                      \
    uint64_t value;                                       \
    __asm__ volatile("mov %%" name ", %0" : "=r"(value)); \
    value;                                                \
  })
#define WRITE(name, value) __asm__ volatile("mov %0, %%" name : : "r"((uint64_t)(value)) : "memory")

static struct cpuid {
  uint32_t eax, ebx, ecx, edx;
} cpuid(uint32_t leaf) {
  struct cpuid is;
  __asm__("cpuid" : "=a"(is.eax), "=b"(is.ebx), "=c"(is.ecx), "=d"(is.edx) : "a"(leaf), "c"(0));
  return is;
}

static bool has_tsc_aux(void) { return cpuid(0x80000001).edx & CPUID_80000001_EDX_RDTSCP; }

// Lets programs use the FPU, SSE and, where there is AVX, that. Returns whether there is.
static bool open_fpu(void) {
  bool has_avx = (cpuid(1).ecx & CPUID_1_ECX_AVX) == CPUID_1_ECX_AVX;
  WRITE("cr0", READ("cr0") | CR0_MP);
  WRITE("cr4", READ("cr4") | CR4_DE | CR4_OSFXSR | CR4_OSXMMEXCPT | (has_avx ? CR4_OSXSAVE : 0));
  if (!has_avx) return false;
  __asm__ volatile("xsetbv" : : "c"(0), "a"(XCR0), "d"(0));
  // KVM on a processor that QEMU emulates does not hear of it, and takes it back.
  return cpuid(CPUID_XSAVE).ebx == XSAVE_SIZE;
}

static void set_lapic(unsigned id, struct state *state) {
  lapic_enable();
  *lapic(LAPIC_TPR) = TASK_PRIORITY;
  *lapic(LAPIC_LDR) = 1u << id << LAPIC_ID_SHIFT;
  if (id == BOOT_PROCESSOR) *lapic(LAPIC_LVT_LINT0) = LVT_EXTERNAL;
  state->svr = *lapic(LAPIC_SVR);
  state->ldr = *lapic(LAPIC_LDR);
  state->lint0 = *lapic(LAPIC_LVT_LINT0);
}

uint64_t *stack_bottom(unsigned id) { return (uint64_t *)(processor_stacks + (id << PROCESSOR_STACK_SHIFT)); }

unsigned processor_of(const void *on_stack) {
  return ((const uint8_t *)on_stack - processor_stacks) >> PROCESSOR_STACK_SHIFT;
}

void set_state(unsigned id) {
  struct state *state = &states[id];
  workers[id].id = id;
  workers[id].fs_word = mix(id, FS_BASE);
  workers[id].gs_word = mix(id, GS_BASE);
  workers[id].has_avx = open_fpu();
  // With a selector that a program may not have, the base would go when one starts.
  __asm__ volatile("mov %0, %%fs; mov %0, %%gs" : : "r"(0));
  for (unsigned i = 0; i < MSRS; i++) write_msr(msrs[i].index, msrs[i].value + id * msrs[i].step);
  if (has_tsc_aux()) write_msr(TSC_AUX, TSC_AUX_VALUE + id);
  write_msr(EFER, read_msr(EFER) | EFER_SCE);
  WRITE("dr0", DEBUG_ADDRESS + id);
  WRITE("dr1", DEBUG_ADDRESS + 0x100 + id);
  WRITE("dr2", DEBUG_ADDRESS + 0x200 + id);
  WRITE("dr3", DEBUG_ADDRESS + 0x300 + id);
  WRITE("dr6", (uint32_t)DR6);
  WRITE("dr7", (uint32_t)DR7);
  state->cr0 = READ("cr0");
  state->cr2 = READ("cr2");
  state->cr3 = READ("cr3");
  state->cr4 = READ("cr4");
  state->efer = read_msr(EFER);
  state->xsave_size = cpuid(CPUID_XSAVE).ebx;
  if (has_lapic()) set_lapic(id, state);
  if (id == BOOT_PROCESSOR) outb(SERIAL_SCRATCH, SCRATCH);
  *stack_bottom(id) = CANARY + id;
}

void expect_cr2(unsigned id, uint64_t address) { states[id].cr2 = address; }

static void check(const char *name, uint64_t expected, uint64_t is) {
  if (is != expected) lost(name, is);
}

void check_state(unsigned id) {
  const struct state *state = &states[id];
  for (unsigned i = 0; i < MSRS; i++) {
    check(msrs[i].name, msrs[i].value + id * msrs[i].step, read_msr(msrs[i].index));
  }
  if (has_tsc_aux()) check("TSC_AUX", TSC_AUX_VALUE + id, read_msr(TSC_AUX));
  check("EFER", state->efer, read_msr(EFER));
  // CPUID tells how much space the parts need that are enabled.
  check("XCR0", state->xsave_size, cpuid(CPUID_XSAVE).ebx);
  check("DR0", DEBUG_ADDRESS + id, READ("dr0"));
  check("DR1", DEBUG_ADDRESS + 0x100 + id, READ("dr1"));
  check("DR2", DEBUG_ADDRESS + 0x200 + id, READ("dr2"));
  check("DR3", DEBUG_ADDRESS + 0x300 + id, READ("dr3"));
  check("DR6", (uint32_t)DR6, READ("dr6"));
  check("DR7", (uint32_t)DR7, READ("dr7"));
  check("CR0", state->cr0, READ("cr0"));
  check("CR2", state->cr2, READ("cr2"));
  check("CR3", state->cr3, READ("cr3"));
  check("CR4", state->cr4, READ("cr4"));
  if (has_lapic()) {
    check("LAPIC ID", id, lapic_id());
    check("LAPIC TPR", TASK_PRIORITY, *lapic(LAPIC_TPR));
    check("LAPIC SVR", state->svr, *lapic(LAPIC_SVR));
    check("LAPIC LDR", state->ldr, *lapic(LAPIC_LDR));
    check("LAPIC LINT0", state->lint0, *lapic(LAPIC_LVT_LINT0));
  }
  if (id == BOOT_PROCESSOR) check("serial port's scratch register", SCRATCH, inb(SERIAL_SCRATCH));
  check("canary of the kernel's stack", CANARY + id, *stack_bottom(id));
}
