// Split virtqueues (VIRTIO 1.2, 2.7), from the driver's side.

#include "virtqueue.h"

enum {
  DESCRIPTOR_ALIGNMENT = 16,
  // Descriptors, the available ring with used_event, the used ring with avail_event.
  MAX_QUEUE_BYTES = (16 + 2 + 8) * MAX_QUEUE_SIZE + 2 * 6 + DESCRIPTOR_ALIGNMENT,
  MAX_QUEUES = 64,
  POLLS_BETWEEN_LOOKS_AT_CLOCK = 1024,
};

// Some 20 s: a device that takes longer has lost the request.
static const uint64_t PATIENCE = 1ul << 36;

static uint8_t memory[MAX_QUEUES * MAX_QUEUE_BYTES] __attribute__((aligned(DESCRIPTOR_ALIGNMENT)));
static unsigned allocated;

// The x86 keeps stores in order, and loads; but a load may be done before an earlier store. (`mfence` would
// do, but KVM's instruction emulator lacks it.)
static inline void full_barrier(void) { __asm__ volatile("lock orl $0, (%%rsp)" ::: "memory"); }
static inline void compiler_barrier(void) { __asm__ volatile("" ::: "memory"); }

static void *allocate(unsigned bytes) {
  void *block = memory + allocated;
  allocated += (bytes + DESCRIPTOR_ALIGNMENT - 1) & -DESCRIPTOR_ALIGNMENT;
  if (allocated > sizeof memory) fail("at most %u queues expected", MAX_QUEUES);
  fill_bytes(block, 0, bytes);
  return block;
}

void virtqueue_free_all(void) { allocated = 0; }

static void write_address(const struct virtio_device *device, unsigned low_register,
                          const volatile void *address) {
  virtio_mmio_write(device, low_register, (uint64_t)address);
  virtio_mmio_write(device, low_register + 4, (uint64_t)address >> 32);
}

// With VIRTIO_F_EVENT_IDX: an interrupt at the next used element, or far away (2.7.7).
static inline void ask_for_interrupt(struct virtqueue *queue) {
  if (queue->used_event) *queue->used_event = options.irq ? queue->last_used : queue->last_used + INT16_MAX;
}

void virtqueue_setup(struct virtqueue *queue, const struct virtio_device *device, unsigned index) {
  virtio_mmio_write(device, QueueSel, index);
  expect("QueueReady", 0, virtio_mmio_read(device, QueueReady));
  uint32_t size = virtio_mmio_read(device, QueueNumMax);
  if (!size || size & (size - 1)) {
    fail("a power of two expected as QueueNumMax of queue %u got %u", index, size);
  }
  if (size > MAX_QUEUE_SIZE) size = MAX_QUEUE_SIZE;

  *queue = (struct virtqueue){
      .device = device, .index = index, .size = size, .mask = size - 1, .free_count = size};
  unsigned descriptors = size * sizeof(struct virtq_desc);
  unsigned available = sizeof(struct virtq_avail) + (size + 1) * sizeof(uint16_t);
  unsigned used = sizeof(struct virtq_used) + size * sizeof(struct virtq_used_elem) + sizeof(uint16_t);
  available = (available + 3) & -4;  // the used ring's alignment
  uint8_t *block = allocate(descriptors + available + used);
  queue->desc = (void *)block;
  queue->avail = (void *)(block + descriptors);
  queue->used = (void *)(block + descriptors + available);
  for (unsigned i = 0; i < size; i++) queue->desc[i].next = i + 1;
  if (device->features & VIRTIO_F_EVENT_IDX) {
    queue->used_event = &queue->avail->ring[size];
    queue->avail_event = (volatile uint16_t *)&queue->used->ring[size];
    ask_for_interrupt(queue);
  } else if (!options.irq) {
    queue->avail->flags = VIRTQ_AVAIL_F_NO_INTERRUPT;
  }

  virtio_mmio_write(device, QueueNum, size);
  write_address(device, QueueDescLow, queue->desc);
  write_address(device, QueueDriverLow, queue->avail);
  write_address(device, QueueDeviceLow, queue->used);
  virtio_mmio_write(device, QueueReady, 1);
  expect("QueueReady", 1, virtio_mmio_read(device, QueueReady));
}

static uint16_t take_descriptor(struct virtqueue *queue) {
  if (!queue->free_count) fail("a free descriptor expected in queue %u", queue->index);
  uint16_t head = queue->free_head;
  queue->free_head = queue->desc[head].next;
  queue->free_count--;
  return head;
}

static void write_descriptor(volatile struct virtq_desc *desc, const struct buffer *buffer, uint16_t flags) {
  desc->addr = (uint64_t)buffer->address;
  desc->len = buffer->length;
  desc->flags = flags;
}

uint16_t virtqueue_prepare(struct virtqueue *queue, const struct buffer *buffers, unsigned readable,
                           unsigned writable, struct virtq_desc *table) {
  unsigned count = readable + writable;
  uint16_t head = take_descriptor(queue), at = head;
  for (unsigned i = 0; i < count; i++) {
    uint16_t flags = (i < readable ? 0 : VIRTQ_DESC_F_WRITE) | (i + 1 < count ? VIRTQ_DESC_F_NEXT : 0);
    if (table) {
      write_descriptor(&table[i], &buffers[i], flags);
      table[i].next = i + 1;
      continue;
    }
    write_descriptor(&queue->desc[at], &buffers[i], flags);
    if (flags & VIRTQ_DESC_F_NEXT) at = queue->desc[at].next = take_descriptor(queue);
  }
  if (table) {
    struct buffer indirect = {table, count * sizeof *table};
    write_descriptor(&queue->desc[head], &indirect, VIRTQ_DESC_F_INDIRECT);
  }
  return head;
}

void virtqueue_release(struct virtqueue *queue, uint16_t head) {
  uint16_t last = head;
  queue->free_count++;
  while (queue->desc[last].flags & VIRTQ_DESC_F_NEXT) {
    last = queue->desc[last].next;
    queue->free_count++;
  }
  queue->desc[last].next = queue->free_head;
  queue->free_head = head;
}

void virtqueue_kick(struct virtqueue *queue) {
  uint16_t old = queue->last_kicked, new = queue->next_avail;
  if (new == old) return;
  compiler_barrier();  // the ring's elements before idx (2.7.13)
  queue->avail->idx = new;
  queue->last_kicked = new;
  full_barrier();  // idx before a look at whether the device wants to know (2.7.13.4.1)
  // Has idx passed avail_event (2.7.10)? vring_need_event() of the specification's virtio_queue.h.
  bool notify = queue->avail_event ? (uint16_t)(new - *queue->avail_event - 1) < (uint16_t)(new - old)
                                   : !(queue->used->flags & VIRTQ_USED_F_NO_NOTIFY);
  if (notify) virtio_mmio_write(queue->device, QueueNotify, queue->index);
}

bool virtqueue_take(struct virtqueue *queue, struct virtq_used_elem *element) {
  if (!virtqueue_has_used(queue)) return false;
  compiler_barrier();  // idx before the element
  *element = queue->used->ring[queue->last_used++ & queue->mask];
  ask_for_interrupt(queue);
  if (!queue->in_flight--) fail("no used element expected in queue %u got one", queue->index);
  if (element->id >= queue->size) {
    fail("a descriptor below %u expected as used got %u", queue->size, element->id);
  }
  return true;
}

static void lose_patience(const struct virtqueue *queue) {
  uint32_t status = virtio_mmio_read(queue->device, Status);
  fail("an answer expected in queue %u of device type %u got none, Status is %u", queue->index,
       queue->device->device_id, status);
}

struct virtq_used_elem virtqueue_wait(struct virtqueue *queue) {
  struct virtq_used_elem element;
  uint64_t start = 0;
  full_barrier();  // used_event before a look at idx, or an interrupt might be missed (2.7.7)
  for (unsigned polls = 0; !virtqueue_has_used(queue); polls++) {
    relax();
    if (options.irq || polls % POLLS_BETWEEN_LOOKS_AT_CLOCK) continue;
    if (!start) start = cycles();
    if (cycles() - start > PATIENCE) lose_patience(queue);
  }
  virtqueue_take(queue, &element);
  return element;
}

uint32_t virtqueue_perform(struct virtqueue *queue, const struct buffer *buffers, unsigned readable,
                           unsigned writable, struct virtq_desc *table) {
  uint16_t head = virtqueue_prepare(queue, buffers, readable, writable, table);
  virtqueue_offer(queue, head);
  virtqueue_kick(queue);
  struct virtq_used_elem element = virtqueue_wait(queue);
  expect("id of the used chain", head, element.id);
  virtqueue_release(queue, head);
  return element.len;
}
