// Split virtqueues (VIRTIO 1.2, 2.7), from the driver's side.
#pragma once

#include "virtio-mmio.h"

enum { VIRTQ_DESC_F_NEXT = 1, VIRTQ_DESC_F_WRITE = 2, VIRTQ_DESC_F_INDIRECT = 4 };
enum { VIRTQ_USED_F_NO_NOTIFY = 1, VIRTQ_AVAIL_F_NO_INTERRUPT = 1 };

struct virtq_desc {
  uint64_t addr;
  uint32_t len;
  uint16_t flags, next;
};

struct virtq_used_elem {
  uint32_t id, len;
};

enum { MAX_QUEUE_SIZE = 128 };

// As in 2.7.6 and 2.7.8. The fields behind the rings move with the queue's size: see struct virtqueue.
struct virtq_avail {
  uint16_t flags, idx;
  uint16_t ring[];
};

struct virtq_used {
  uint16_t flags, idx;
  struct virtq_used_elem ring[];
};

struct virtqueue {
  const struct virtio_device *device;
  uint16_t index, size, mask;
  volatile struct virtq_desc *desc;
  volatile struct virtq_avail *avail;
  volatile struct virtq_used *used;
  volatile uint16_t *used_event, *avail_event;  // 0 without VIRTIO_F_EVENT_IDX
  uint16_t free_head, free_count;
  uint16_t next_avail;     // what avail->idx becomes with the next kick
  uint16_t last_kicked;    // avail->idx at the last kick
  uint16_t last_used;      // how far the used ring was read
  uint16_t in_flight;
};

// A piece of memory for the device to read or to write.
struct buffer {
  const volatile void *address;
  uint32_t length;
};

// Sets up a queue of a device that is not DRIVER_OK yet (4.2.3.2).
void virtqueue_setup(struct virtqueue *queue, const struct virtio_device *device, unsigned index);
// Gives the memory of all queues back. The devices must have been reset.
void virtqueue_free_all(void);

// Writes a chain's descriptors, the readable buffers first, as 2.7.4.2 has it. With a `table` they go there,
// and the queue has one descriptor, the indirect one (2.7.5.3). Returns the chain's head.
uint16_t virtqueue_prepare(struct virtqueue *queue, const struct buffer *buffers, unsigned readable,
                           unsigned writable, struct virtq_desc *table);
// Takes the descriptors of a chain back.
void virtqueue_release(struct virtqueue *queue, uint16_t head);

// Makes a chain available; the device sees it at the next kick.
static inline void virtqueue_offer(struct virtqueue *queue, uint16_t head) {
  queue->avail->ring[queue->next_avail++ & queue->mask] = head;
  queue->in_flight++;
}
void virtqueue_kick(struct virtqueue *queue);

static inline bool virtqueue_has_used(const struct virtqueue *queue) {
  return queue->used->idx != queue->last_used;
}
// Takes the next element of the used ring, if there is one.
bool virtqueue_take(struct virtqueue *queue, struct virtq_used_elem *element);
// Waits for it.
struct virtq_used_elem virtqueue_wait(struct virtqueue *queue);

// All of that for one request, with nothing else in flight. Returns how many bytes the device wrote.
uint32_t virtqueue_perform(struct virtqueue *queue, const struct buffer *buffers, unsigned readable,
                           unsigned writable, struct virtq_desc *table);
