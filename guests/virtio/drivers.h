// The drivers' tests and measurements: each has a word on the command line.
#pragma once

#include "virtio-mmio.h"

// Runs with a device of its type, which it starts if none before it did.
typedef void test(struct virtio_device *device, const uint64_t *arguments);

test entropy_test;
test entropy_bench_doorbell;  // arguments: requests

test block_test;
test block_bench_sequential;  // arguments: requests, how many of them in flight
test block_bench_random;

test console_test;
test console_echo;   // arguments: port
test console_bench;  // arguments: bytes, size of a buffer, buffers in flight

// What a measurement prints.
static inline void print_measurement(const char *name, uint64_t requests, uint64_t bytes, uint64_t cycles) {
  print_line("%s requests=%lu bytes=%lu cycles=%lu", name, requests, bytes, cycles);
}
