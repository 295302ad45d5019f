// Virtio over MMIO, version 2 (VIRTIO 1.2, 4.2): finding devices and their start.

#include "virtio-mmio.h"

enum { MAGIC = 0x74726976, VERSION = 2 };  // "virt"

struct virtio_device devices[MAX_DEVICES];
unsigned device_count;

// <size>@<base>:<irq>[:<id>]; the size does not matter, nor what Linux would call the device.
static void parse_parameter(const char *text, uint64_t *base, uint64_t *irq) {
  const char *rest = text;
  uint64_t ignored;
  bool valid = parse_number(&rest, &ignored) && *rest++ == '@' && parse_number(&rest, base) &&
               *rest++ == ':' && parse_number(&rest, irq) &&
               (*rest != ':' || (rest++, parse_number(&rest, &ignored)));
  if (valid && (!*rest || *rest == ' ')) return;
  fail("<size>@<base>:<irq>[:<id>] expected behind virtio_mmio.device= got %s", text);
}

void virtio_mmio_add(const char *parameter) {
  uint64_t base, irq;
  parse_parameter(parameter, &base, &irq);
  if (base > UINT32_MAX || irq >= IOAPIC_PINS) {
    fail("a base below 4 GiB and an irq below %u expected got %s", IOAPIC_PINS, parameter);
  }

  struct virtio_device device = {.registers = (volatile uint8_t *)base, .irq = irq};
  if (virtio_mmio_read(&device, MagicValue) != MAGIC) fail("a virtio device expected at %lx", base);
  expect("Version", VERSION, virtio_mmio_read(&device, Version));
  device.device_id = virtio_mmio_read(&device, DeviceID);
  if (options.verbose) {
    print_line("# device at %lx irq %u type %u vendor %lx", base, device.irq, device.device_id,
               (unsigned long)virtio_mmio_read(&device, VendorID));
  }
  if (!device.device_id) return;  // nothing is plugged in here (4.2.3.1.1)

  if (device_count == MAX_DEVICES) fail("at most %u devices expected got more", MAX_DEVICES);
  for (unsigned i = 0; i < device_count; i++) device.number += devices[i].device_id == device.device_id;
  devices[device_count++] = device;
}

static void set_status(struct virtio_device *device, uint32_t bit) {
  virtio_mmio_write(device, Status, virtio_mmio_read(device, Status) | bit);
}

void virtio_mmio_reset(struct virtio_device *device) {
  virtio_mmio_write(device, Status, 0);
  while (virtio_mmio_read(device, Status)) __asm__ volatile("pause");
  device->started = false;
}

void virtio_mmio_negotiate(struct virtio_device *device, uint64_t wanted) {
  wanted |= VIRTIO_F_VERSION_1;
  if (!options.no_indirect) wanted |= VIRTIO_F_INDIRECT_DESC;
  if (!options.no_event_idx) wanted |= VIRTIO_F_EVENT_IDX;

  virtio_mmio_reset(device);
  set_status(device, ACKNOWLEDGE);
  set_status(device, DRIVER);
  virtio_mmio_write(device, DeviceFeaturesSel, 1);
  uint64_t offered = (uint64_t)virtio_mmio_read(device, DeviceFeatures) << 32;
  virtio_mmio_write(device, DeviceFeaturesSel, 0);
  offered |= virtio_mmio_read(device, DeviceFeatures);
  device->features = offered & wanted;
  if (!(offered & VIRTIO_F_VERSION_1)) fail("VIRTIO_F_VERSION_1 expected as a feature got %lx", offered);
  virtio_mmio_write(device, DriverFeaturesSel, 1);
  virtio_mmio_write(device, DriverFeatures, device->features >> 32);
  virtio_mmio_write(device, DriverFeaturesSel, 0);
  virtio_mmio_write(device, DriverFeatures, device->features);
  set_status(device, FEATURES_OK);
  expect("Status", ACKNOWLEDGE | DRIVER | FEATURES_OK, virtio_mmio_read(device, Status));

  if (options.verbose) print_line("# features offered %lx negotiated %lx", offered, device->features);
  device->interrupts = 0;
  device->config_changed = false;
  if (options.irq) open_interrupt(device->irq);
}

void virtio_mmio_driver_ok(struct virtio_device *device) {
  set_status(device, DRIVER_OK);
  expect("Status", ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, virtio_mmio_read(device, Status));
  device->started = true;
}

void virtio_mmio_interrupt(unsigned irq) {
  for (unsigned i = 0; i < device_count; i++) {
    struct virtio_device *device = &devices[i];
    if (device->irq != irq) continue;
    // Until nothing is left: see open_interrupt().
    for (uint32_t status; (status = virtio_mmio_read(device, InterruptStatus));) {
      virtio_mmio_write(device, InterruptACK, status);
      device->interrupts++;
      if (status & CONFIGURATION_CHANGE_NOTIFICATION) device->config_changed = true;
    }
  }
}

void virtio_mmio_expect_interrupt(const struct virtio_device *device) {
  while (options.irq && !device->interrupts) sleep_until_interrupt();
}
