// Virtio over MMIO, version 2: finding devices, their start, their configuration.
// VIRTIO 1.2, 4.2; https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html
#pragma once

#include "kernel.h"

enum { MAX_DEVICES = 16 };

// Device types (5).
enum { BLOCK_DEVICE = 2, CONSOLE = 3, ENTROPY_SOURCE = 4 };

// Registers (4.2.2).
enum {
  MagicValue = 0x000,
  Version = 0x004,
  DeviceID = 0x008,
  VendorID = 0x00c,
  DeviceFeatures = 0x010,
  DeviceFeaturesSel = 0x014,
  DriverFeatures = 0x020,
  DriverFeaturesSel = 0x024,
  QueueSel = 0x030,
  QueueNumMax = 0x034,
  QueueNum = 0x038,
  QueueReady = 0x044,
  QueueNotify = 0x050,
  InterruptStatus = 0x060,
  InterruptACK = 0x064,
  Status = 0x070,
  QueueDescLow = 0x080,
  QueueDescHigh = 0x084,
  QueueDriverLow = 0x090,
  QueueDriverHigh = 0x094,
  QueueDeviceLow = 0x0a0,
  QueueDeviceHigh = 0x0a4,
  ConfigGeneration = 0x0fc,
  Config = 0x100,
};

// Bits of Status (2.1).
enum {
  ACKNOWLEDGE = 1,
  DRIVER = 2,
  DRIVER_OK = 4,
  FEATURES_OK = 8,
  DEVICE_NEEDS_RESET = 64,
  FAILED = 128,
};

// Bits of InterruptStatus.
enum { USED_BUFFER_NOTIFICATION = 1, CONFIGURATION_CHANGE_NOTIFICATION = 2 };

// Features that any device may offer (6), as masks.
#define VIRTIO_F_INDIRECT_DESC (1ul << 28)
#define VIRTIO_F_EVENT_IDX (1ul << 29)
#define VIRTIO_F_VERSION_1 (1ul << 32)

struct virtio_device {
  volatile uint8_t *registers;
  unsigned irq;
  uint32_t device_id;
  unsigned number;    // among those of its type
  uint64_t features;  // the negotiated ones
  bool started;
  // What its interrupts said; only with the word `irq`.
  volatile unsigned interrupts;
  volatile bool config_changed;
};

extern struct virtio_device devices[MAX_DEVICES];
extern unsigned device_count;

// Adds the device of one `virtio_mmio.device=<size>@<base>:<irq>[:<id>]`, if there is one at that address.
void virtio_mmio_add(const char *parameter);

// Starts a device (3.1.1) in two steps; the driver sets up its queues (virtqueue_setup) between them. Of the
// features offered it takes VERSION_1, those of virtqueues, and `wanted`.
void virtio_mmio_negotiate(struct virtio_device *device, uint64_t wanted);
void virtio_mmio_driver_ok(struct virtio_device *device);

// Resets a device (2.4): it forgets its queues, and may not touch memory any more.
void virtio_mmio_reset(struct virtio_device *device);

// The interrupt handler.
void virtio_mmio_interrupt(unsigned irq);

// Waits until a device has given an interrupt. (A test that is over may be so before it.)
void virtio_mmio_expect_interrupt(const struct virtio_device *device);

static inline uint32_t virtio_mmio_read(const struct virtio_device *device, unsigned offset) {
  return *(volatile uint32_t *)(device->registers + offset);
}

static inline void virtio_mmio_write(const struct virtio_device *device, unsigned offset, uint32_t value) {
  *(volatile uint32_t *)(device->registers + offset) = value;
}

// Fields of the configuration space, each read with its own width (4.2.2.2). What takes two reads is read
// again if ConfigGeneration says that it changed between them (2.5.1).
static inline uint8_t config_read_8(const struct virtio_device *device, unsigned offset) {
  return device->registers[Config + offset];
}

static inline uint16_t config_read_16(const struct virtio_device *device, unsigned offset) {
  return *(volatile uint16_t *)(device->registers + Config + offset);
}

static inline uint32_t config_read_32(const struct virtio_device *device, unsigned offset) {
  return virtio_mmio_read(device, Config + offset);
}

static inline uint64_t config_read_64(const struct virtio_device *device, unsigned offset) {
  uint32_t generation;
  uint64_t value;
  do {
    generation = virtio_mmio_read(device, ConfigGeneration);
    value = config_read_32(device, offset) | (uint64_t)config_read_32(device, offset + 4) << 32;
  } while (generation != virtio_mmio_read(device, ConfigGeneration));
  return value;
}
