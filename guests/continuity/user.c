// What runs in user mode (CPL 3). It uses neither FPU nor SSE: those hold values of steps.S all the time.

#include "kernel.h"
#include "ports.h"

enum {
  STEPS = 512,  // of a round
  PARTS = 20,   // after each of them the worker calls the kernel
  PARTS_A_LINE = 2,
  ROUNDS_A_DEVICE = 16,
  DEVICE_ANSWER = 4,   // offset of the register that is read
  MEMORY_SIZE = 0x80000,
};

enum { FX_SIZE = 512, FX_FCW = 0, FX_FSW = 2, FX_MXCSR = 24, FX_ST = 32, FX_XMM = 160, FX_XMM_END = 416 };
// Processors and emulators differ in which exceptions they note, so those are no part of the answer.
enum { FSW_TOP = 0x3800, MXCSR_CONTROL = 0xffc0, ST_HIGH = 0xffff };

struct worker workers[MAX_WORKERS];
uint8_t user_stacks[MAX_WORKERS][USER_STACK_SIZE] __attribute__((aligned(4096)));
static uint8_t buffers[MAX_WORKERS][BUFFER_SIZE] __attribute__((aligned(4096)));
// Mostly left alone: one tenth of it is changed after each tenth of the work.
static uint64_t memory[MEMORY_SIZE / 8] __attribute__((aligned(4096)));
volatile uint64_t shared_sum;
static volatile bool lock;

static void call(enum call number, uint64_t argument) {
  __asm__ volatile("ud2" : : "a"((uint64_t)number), "D"(argument) : "memory");
}

static void touch(uint64_t address) {
  __asm__ volatile(".byte 0xf6, 0x00, 0x00" : : "a"(address) : "memory", "cc");  // testb $0, (%rax)
}

static void share(uint64_t value) {
  while (__atomic_exchange_n(&lock, true, __ATOMIC_ACQUIRE)) __builtin_ia32_pause();
  shared_sum = shared_sum + value;
  __atomic_store_n(&lock, false, __ATOMIC_RELEASE);
}

static uint64_t talk_to_device(uint64_t hash) {
  outl(DEVICE_PORT, hash);
  hash = mix(hash, inl(DEVICE_PORT + DEVICE_ANSWER));
  *(volatile uint32_t *)DEVICE_MEMORY = hash;
  return mix(hash, *(volatile uint32_t *)(DEVICE_MEMORY + DEVICE_ANSWER));
}

static void write_memory(unsigned part, uint64_t hash) {
  const unsigned words = MEMORY_SIZE / 8, parts = PARTS / PARTS_A_LINE;
  const unsigned end = words * (part + 1) / parts;
  for (unsigned i = words * part / parts; i < end; i++) memory[i] = mix(hash, memory[i] + i);
}

static uint64_t hash_words(uint64_t hash, const uint64_t *words, unsigned count) {
  for (unsigned i = 0; i < count; i++) hash = mix(hash, words[i]);
  return hash;
}

static uint64_t hash_fpu(uint64_t hash) {
  uint8_t area[FX_SIZE] __attribute__((aligned(16)));
  __asm__ volatile("fxsave64 %0" : "=m"(area));
  hash = mix(hash, *(uint16_t *)(area + FX_FCW));
  hash = mix(hash, *(uint16_t *)(area + FX_FSW) & FSW_TOP);
  hash = mix(hash, *(uint32_t *)(area + FX_MXCSR) & MXCSR_CONTROL);
  for (unsigned at = FX_ST; at < FX_XMM; at += 16) {
    hash = mix(hash, *(uint64_t *)(area + at));
    hash = mix(hash, *(uint64_t *)(area + at + 8) & ST_HIGH);
  }
  return hash_words(hash, (uint64_t *)(area + FX_XMM), (FX_XMM_END - FX_XMM) / 8);
}

static uint64_t upper_half(uint64_t id, unsigned index) { return mix(id + 1, index + 1); }

// The upper halves of the YMM registers are no part of the answer, which processors without them give too.
static void set_upper_halves(uint64_t id) {
  uint64_t halves[16][2];
  for (unsigned i = 0; i < 32; i++) halves[i / 2][i % 2] = upper_half(id, i);
  load_upper_halves(halves);
}

static uint64_t read_xcr0(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

static void check_avx(const struct worker *worker) {
  if (!worker->has_avx) return;
  if (worker->sees_xcr0 && read_xcr0() != XCR0) call(CALL_LOST, (uint64_t)"XCR0");
  uint64_t halves[16][2];
  store_upper_halves(halves);
  for (unsigned i = 0; i < 32; i++) {
    if (halves[i / 2][i % 2] != upper_half(worker->id, i)) call(CALL_LOST, (uint64_t)"upper half of YMM");
  }
}

void user_main(struct worker *worker) {
  bool is_first = worker->id == BOOT_PROCESSOR;
  worker->buffer = buffers[worker->id];
  uint64_t *words = (uint64_t *)worker->buffer, hash = mix(0, worker->id + 1);
  for (unsigned i = 0; i < BUFFER_SIZE / 8; i++) words[i] = hash = mix(hash, i);
  for (unsigned i = 0; i < REGISTERS; i++) worker->registers[i] = hash = mix(hash, i);
  start_fpu(worker->buffer);
  if (worker->has_avx) {
    set_upper_halves(worker->id);
    worker->sees_xcr0 = read_xcr0() == XCR0;
  }
  if (is_first) {
    for (unsigned part = 0; part < PARTS / PARTS_A_LINE; part++) write_memory(part, hash);
  }
  unsigned round = 0;
  for (unsigned part = 1; part <= PARTS; part++) {
    for (; round < (uint64_t)options.rounds * part / PARTS; round++) {
      run_steps(worker, STEPS);
      if (is_first && options.device && round % ROUNDS_A_DEVICE == 0) hash = talk_to_device(hash);
    }
    hash = hash_words(hash, worker->registers, REGISTERS);
    share(hash);
    check_avx(worker);
    call(CALL_CHECK, 0);
    touch(NOT_MAPPED + hash % NOT_MAPPED_SIZE);  // CR2 from now on
    if (!is_first || part % PARTS_A_LINE) continue;
    write_memory(part / PARTS_A_LINE - 1, hash);
    if (options.cpus > 1) call(CALL_PING, 0);
    call(CALL_PROGRESS, 100 * part / PARTS);
  }
  hash = hash_words(hash, words, BUFFER_SIZE / 8);
  if (is_first) hash = hash_words(hash, memory, MEMORY_SIZE / 8);
  call(CALL_FINISH, hash_fpu(hash));
}
