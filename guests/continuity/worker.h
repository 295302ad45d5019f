// A worker: what each processor computes with in user mode.
#pragma once

#define REGISTERS 12

// Offsets in struct worker, for steps.S.
#define WORKER_BUFFER 96
#define WORKER_POSITION 104
#define WORKER_CARRY 112

// x87, SSE and AVX are enabled.
#define XCR0 7
// 64 KiB: a position is 16 bits.
#define BUFFER_SIZE 0x10000

#ifndef __ASSEMBLER__
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_WORKERS = 8, USER_STACK_SIZE = 8192 };

struct worker {
  uint64_t registers[REGISTERS];  // between the runs of steps.S: rax, rbx, rdx, rbp, r8 to r15
  uint8_t *buffer;
  uint64_t position;
  uint64_t carry;
  uint64_t id;
  uint64_t hash;
  bool has_avx;    // and XCR0 says so
  bool sees_xcr0;  // KVM on PVM shows the host's in user mode
  uint64_t fs_word, gs_word;  // where the segments' bases lead
};
_Static_assert(offsetof(struct worker, buffer) == WORKER_BUFFER, "as in steps.S");
_Static_assert(offsetof(struct worker, position) == WORKER_POSITION, "as in steps.S");
_Static_assert(offsetof(struct worker, carry) == WORKER_CARRY, "as in steps.S");

extern struct worker workers[MAX_WORKERS];

// --- user.c
// The host's device. Bytes 0 to 3 are written, 4 to 7 read.
enum { DEVICE_PORT = 0x500, DEVICE_MEMORY = 0xd0000000 };
// What a worker with that id runs. It does not return.
void user_main(struct worker *worker);
extern uint8_t user_stacks[MAX_WORKERS][USER_STACK_SIZE];
// The sum of what all workers gave under the lock.
extern volatile uint64_t shared_sum;

// Calls of the kernel: `ud2` with the number in rax and an argument in rdi. It goes on behind that.
enum call { CALL_CHECK, CALL_PROGRESS, CALL_PING, CALL_FINISH, CALL_LOST };
enum { UD2 = 0x0b0f, UD2_SIZE = 2 };
// What user mode touches there faults, with the address in rax. It goes on behind that instruction.
static const uint64_t NOT_MAPPED = 0x400000000000, NOT_MAPPED_SIZE = 0x200000000000;
enum { TOUCH_SIZE = 3 };

static inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15;
  return hash ^ hash >> 32;
}

// --- steps.S
// Computes with all registers at once, see there.
void run_steps(struct worker *worker, uint64_t steps);
// Gives the FPU and the SSE registers values that are there from then on, from 16 + 14 * 16 bytes.
void start_fpu(const uint8_t *from);
// The upper halves of YMM0 to YMM15, which no other instruction here touches.
void load_upper_halves(const uint64_t halves[16][2]);
void store_upper_halves(uint64_t halves[16][2]);
#endif
