// The entropy device (VIRTIO 1.2, 5.4): it fills buffers with random bytes.

#include "drivers.h"
#include "virtqueue.h"

enum { REQUEST_BYTES = 64, DOORBELL_BYTES = 16, MAX_SEGMENTS = 3 };

static struct virtqueue queues[MAX_DEVICES];
static uint8_t bytes[2][REQUEST_BYTES + 1];  // the last one is not the device's
static struct virtq_desc table[MAX_SEGMENTS];

static struct virtqueue *start(struct virtio_device *device) {
  struct virtqueue *queue = &queues[device->number];
  if (device->started) return queue;
  virtio_mmio_negotiate(device, 0);
  virtqueue_setup(queue, device, 0);
  virtio_mmio_driver_ok(device);
  return queue;
}

static void request(struct virtqueue *queue, uint8_t *into, const uint16_t *segments, unsigned count,
                    struct virtq_desc *indirect) {
  static const uint8_t zeroes[REQUEST_BYTES + 1];
  struct buffer buffers[MAX_SEGMENTS];
  unsigned at = 0;
  for (unsigned i = 0; i < count; at += segments[i++]) buffers[i] = (struct buffer){into + at, segments[i]};
  fill_bytes(into, 0, REQUEST_BYTES + 1);
  // A device may give less (5.4.6), but these are few enough for any.
  expect("random bytes", REQUEST_BYTES, virtqueue_perform(queue, buffers, 0, count, indirect));
  // A 16th of it is zero by chance once in 2^32 times: enough to find a segment that was left out.
  for (at = 0; at < REQUEST_BYTES; at += REQUEST_BYTES / 16) {
    if (same_bytes(into + at, zeroes, REQUEST_BYTES / 16)) fail("random bytes expected at %u got zeroes", at);
  }
  expect("byte behind the buffer", 0, into[REQUEST_BYTES]);
}

void entropy_test(struct virtio_device *device, const uint64_t *arguments) {
  (void)arguments;
  static const uint16_t whole[] = {REQUEST_BYTES}, pieces[] = {16, 7, 41};
  struct virtqueue *queue = start(device);
  request(queue, bytes[0], whole, COUNT(whole), NULL);
  request(queue, bytes[1], whole, COUNT(whole), NULL);
  if (same_bytes(bytes[0], bytes[1], REQUEST_BYTES)) fail("different bytes expected got the same twice");
  print_line("entropy: %u bytes, %u bytes, different", REQUEST_BYTES, REQUEST_BYTES);
  request(queue, bytes[0], pieces, COUNT(pieces), NULL);
  print_line("entropy: 3 descriptors ok");
  if (device->features & VIRTIO_F_INDIRECT_DESC) {
    request(queue, bytes[0], pieces, COUNT(pieces), table);
    print_line("entropy: indirect descriptors ok");
  }
  virtio_mmio_expect_interrupt(device);
}

void entropy_bench_doorbell(struct virtio_device *device, const uint64_t *arguments) {
  struct virtqueue *queue = start(device);
  struct buffer buffer = {bytes[0], DOORBELL_BYTES};
  uint16_t head = virtqueue_prepare(queue, &buffer, 0, 1, NULL);
  uint64_t written = 0, begin = cycles();
  for (uint64_t i = 0; i < arguments[0]; i++) {
    virtqueue_offer(queue, head);
    virtqueue_kick(queue);
    written += virtqueue_wait(queue).len;
  }
  print_measurement("bench-doorbell", arguments[0], written, cycles() - begin);
  virtqueue_release(queue, head);
}
