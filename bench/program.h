// What the C programs of the benchmarks share.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { ENTRY = 0x7c00, EXIT_PORT = 0xf4, MEMORY_SIZE = 128 << 20, MAX_CPUID_ENTRIES = 256, PAGE_SIZE = 4096 };

// What VT-x needs for real mode; anywhere outside the guest's memory.
static const uint64_t IDENTITY_MAP_ADDRESS = 0xfffbc000;
static const uint64_t TSS_ADDRESS = 0xfffbd000;

static int kvm;
static size_t run_size;
static struct kvm_cpuid2 *cpuid;

static inline void die(const char *what) {
  fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror(errno));
  exit(1);
}

static inline int check(int result, const char *what) {
  if (result < 0) die(what);
  return result;
}

static inline uint64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline int compare_times(const void *a, const void *b) {
  uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
  return (left > right) - (left < right);
}

static inline double median(uint64_t *times, size_t count) {
  qsort(times, count, sizeof *times, compare_times);
  return (double)times[count / 2];
}

// Once for all machines, as nodevisor does.
static inline void open_kvm(void) {
  kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "open /dev/kvm");
  run_size = (size_t)check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
  cpuid = calloc(1, sizeof *cpuid + MAX_CPUID_ENTRIES * sizeof cpuid->entries[0]);
  cpuid->nent = MAX_CPUID_ENTRIES;
  check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
}

static inline size_t read_image(const char *path, uint8_t *image, size_t room) {
  int fd = check(open(path, O_RDONLY), path);
  size_t size = (size_t)check((int)read(fd, image, room), path);
  close(fd);
  return size;
}
