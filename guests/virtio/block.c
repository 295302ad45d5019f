// The block device (VIRTIO 1.2, 5.2).

#include "drivers.h"
#include "virtqueue.h"

// Feature bits (5.2.3), as masks.
enum {
  VIRTIO_BLK_F_RO = 1 << 5,
  VIRTIO_BLK_F_BLK_SIZE = 1 << 6,
  VIRTIO_BLK_F_FLUSH = 1 << 9,
  VIRTIO_BLK_F_MQ = 1 << 12,
  VIRTIO_BLK_F_DISCARD = 1 << 13,
  VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14,
};

// Offsets in the configuration space (5.2.4).
enum {
  capacity = 0,
  blk_size = 20,
  num_queues = 34,
  max_discard_sectors = 36,
  max_write_zeroes_sectors = 48,
  write_zeroes_may_unmap = 56,
};

// Types of requests, and how they end (5.2.6).
enum {
  VIRTIO_BLK_T_IN = 0,
  VIRTIO_BLK_T_OUT = 1,
  VIRTIO_BLK_T_FLUSH = 4,
  VIRTIO_BLK_T_GET_ID = 8,
  VIRTIO_BLK_T_DISCARD = 11,
  VIRTIO_BLK_T_WRITE_ZEROES = 13,
  NO_TYPE = 64,
};
enum { VIRTIO_BLK_S_OK = 0, VIRTIO_BLK_S_IOERR = 1, VIRTIO_BLK_S_UNSUPP = 2, NO_STATUS = 0xff };
enum { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1, VIRTIO_BLK_ID_BYTES = 20 };

struct virtio_blk_req_header {
  uint32_t type, reserved;
  uint64_t sector;
};

struct virtio_blk_discard_write_zeroes {
  uint64_t sector;
  uint32_t num_sectors;
  uint32_t flags;
};

enum {
  SECTOR_SIZE = 512,
  PAGE = 4096,
  MAX_QUEUES = 4,
  MAX_IN_FLIGHT = 32,
  MAX_DATA = 128 * 1024,
  MAX_SEGMENTS = 16,
  TEST_IN_FLIGHT = 8,
  RANDOM_BYTES = 4096,
};

struct disk {
  struct virtqueue queues[MAX_QUEUES];
  const struct virtio_device *device;
  unsigned queue_count;
  uint64_t sectors, blocks;
  uint32_t block_size;  // bytes: requests are multiples of it
  bool read_only;
};
static struct disk disks[MAX_DEVICES];

// A request in memory, without gaps, as the device sees it wherever descriptors cut it: header, data, status.
// The data are the page's first bytes, since that is what a disk's users have.
struct request {
  uint8_t unused[PAGE - sizeof(struct virtio_blk_req_header)];
  struct virtio_blk_req_header header;
  uint8_t data[MAX_DATA];
  uint8_t status;  // behind MAX_DATA bytes of data; others end earlier: see status_of()
} __attribute__((aligned(PAGE)));
static struct request requests[MAX_IN_FLIGHT];

// What the tests write into sector s: byte i is (7 s + i) mod 251.
enum { PATTERN_PERIOD = 251, PATTERN_STEP = 7 };
static uint8_t pattern[PATTERN_PERIOD + SECTOR_SIZE];

static volatile uint8_t *status_of(struct request *request, uint32_t length) {
  return &request->data[length];
}

// --- Patterns

static const uint8_t *pattern_of(uint64_t sector) { return pattern + sector * PATTERN_STEP % PATTERN_PERIOD; }

static void make_pattern(void) {
  for (unsigned i = 0; i < sizeof pattern; i++) pattern[i] = i % PATTERN_PERIOD;
}

static void fill_sectors(uint8_t *data, uint64_t sector, uint32_t length) {
  for (uint32_t at = 0; at < length; at += SECTOR_SIZE, sector++) {
    copy_bytes(data + at, pattern_of(sector), SECTOR_SIZE);
  }
}

static void check_sectors(const uint8_t *data, uint64_t sector, uint32_t length) {
  for (uint32_t at = 0; at < length; at += SECTOR_SIZE, sector++) {
    const uint8_t *wanted = pattern_of(sector);
    if (same_bytes(data + at, wanted, SECTOR_SIZE)) continue;
    unsigned i = 0;
    while (data[at + i] == wanted[i]) i++;
    fail("byte %u of sector %lu expected %u got %u", i, sector, wanted[i], data[at + i]);
  }
}

// --- Requests

// Where descriptors cut a request: sizes of the first ones, of the readable and of the writable part alike.
// The last descriptor of a part has the rest.
struct cuts {
  uint16_t count, sizes[MAX_SEGMENTS];
};

static unsigned cut(struct buffer *buffers, const uint8_t *from, uint32_t length, const struct cuts *cuts) {
  unsigned count = 0;
  for (; count < cuts->count && cuts->sizes[count] < length; count++) {
    buffers[count] = (struct buffer){from, cuts->sizes[count]};
    from += cuts->sizes[count];
    length -= cuts->sizes[count];
  }
  buffers[count] = (struct buffer){from, length};
  return count + 1;
}

static bool reads_disk(uint32_t type) { return type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID; }

// The usual layout: header, data and status have descriptors of their own. Others: see `cuts`.
static uint16_t prepare(struct virtqueue *queue, struct request *request, uint32_t type, uint64_t sector,
                        uint32_t length, const struct cuts *cuts, struct virtq_desc *table) {
  struct buffer buffers[2 * MAX_SEGMENTS];
  const uint8_t *header = (const uint8_t *)&request->header;
  uint32_t in = reads_disk(type) ? length : 0, out = length - in;
  const struct cuts usual_out = {1, {sizeof request->header}};
  unsigned readable = cut(buffers, header, sizeof request->header + out, cuts ? cuts : &usual_out), writable;
  if (cuts) {
    writable = cut(buffers + readable, request->data + out, in + 1, cuts);
  } else {
    writable = 0;
    if (in) buffers[readable + writable++] = (struct buffer){request->data, in};
    buffers[readable + writable++] = (struct buffer){status_of(request, length), 1};
  }
  request->header = (struct virtio_blk_req_header){.type = type, .sector = sector};
  *status_of(request, length) = NO_STATUS;
  return virtqueue_prepare(queue, buffers, readable, writable, table);
}

static void check_written(uint32_t type, uint32_t length, uint32_t written) {
  expect("bytes written into the request", (reads_disk(type) ? length : 0) + 1, written);
}

// One request, alone; its data are in requests[0]. Returns its status.
static uint8_t perform_cut(struct virtqueue *queue, uint32_t type, uint64_t sector, uint32_t length,
                           const struct cuts *cuts, struct virtq_desc *table) {
  uint16_t head = prepare(queue, &requests[0], type, sector, length, cuts, table);
  virtqueue_offer(queue, head);
  virtqueue_kick(queue);
  struct virtq_used_elem element = virtqueue_wait(queue);
  expect("id of the used chain", head, element.id);
  virtqueue_release(queue, head);
  uint8_t status = *status_of(&requests[0], length);
  if (status == VIRTIO_BLK_S_OK) check_written(type, length, element.len);
  return status;
}

static uint8_t perform(struct disk *disk, uint32_t type, uint64_t sector, uint32_t length) {
  return perform_cut(&disk->queues[0], type, sector, length, NULL, NULL);
}

static void write_sectors(struct disk *disk, uint64_t sector, uint32_t length) {
  fill_sectors(requests[0].data, sector, length);
  expect("status of a write", VIRTIO_BLK_S_OK, perform(disk, VIRTIO_BLK_T_OUT, sector, length));
}

static void read_back(struct disk *disk, uint64_t sector, uint32_t length) {
  fill_bytes(requests[0].data, 0, length);
  expect("status of a read", VIRTIO_BLK_S_OK, perform(disk, VIRTIO_BLK_T_IN, sector, length));
  check_sectors(requests[0].data, sector, length);
}

// --- Start

static struct disk *start(struct virtio_device *device) {
  struct disk *disk = &disks[device->number];
  if (device->started) return disk;
  virtio_mmio_negotiate(device, VIRTIO_BLK_F_RO | VIRTIO_BLK_F_BLK_SIZE | VIRTIO_BLK_F_FLUSH |
                                    VIRTIO_BLK_F_MQ | VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES);
  uint64_t features = device->features;
  *disk = (struct disk){
      .device = device,
      .queue_count = features & VIRTIO_BLK_F_MQ ? config_read_16(device, num_queues) : 1,
      .sectors = config_read_64(device, capacity),
      .block_size = features & VIRTIO_BLK_F_BLK_SIZE ? config_read_32(device, blk_size) : SECTOR_SIZE,
      .read_only = (features & VIRTIO_BLK_F_RO) != 0,
  };
  if (!disk->queue_count) fail("num_queues of at least 1 expected got 0");
  if (disk->queue_count > MAX_QUEUES) disk->queue_count = MAX_QUEUES;
  if (disk->block_size % SECTOR_SIZE || !disk->block_size || disk->block_size > PAGE) {
    fail("blk_size of a multiple of 512 up to 4096 expected got %u", disk->block_size);
  }
  disk->blocks = disk->sectors * SECTOR_SIZE / disk->block_size;
  for (unsigned i = 0; i < disk->queue_count; i++) virtqueue_setup(&disk->queues[i], device, i);
  virtio_mmio_driver_ok(device);
  if (!pattern[1]) make_pattern();
  return disk;
}

// --- Tests. Blocks from 1 on are written, each test has its own; the last one, too.

enum {
  FIRST_BLOCK = 1,
  SCATTERED = 2,
  TOGETHER = 4,
  INDIRECT = 5,
  CLEARED = 7,  // three blocks, of which the second is cleared; then the same again
  IN_FLIGHT = 13,
  FEWEST_BLOCKS = 32,
};

static uint64_t sector_of(const struct disk *disk, uint64_t block) {
  return block * (disk->block_size / SECTOR_SIZE);
}

static void print_ok(const struct disk *disk, const char *what) {
  print_line("block %u: %s ok", disk->device->number, what);
}

static void show(struct disk *disk) {
  unsigned number = disk->device->number;
  print_line("block %u: %lu sectors, blocks of %u bytes, %u queue%s%s", number, disk->sectors,
             disk->block_size, disk->queue_count, disk->queue_count == 1 ? "" : "s",
             disk->read_only ? ", read-only" : "");

  char id[VIRTIO_BLK_ID_BYTES + 1] = "";  // without a zero at its end if it is of full length (5.2.6.4)
  fill_bytes(requests[0].data, 0, VIRTIO_BLK_ID_BYTES);
  expect("status of GET_ID", VIRTIO_BLK_S_OK, perform(disk, VIRTIO_BLK_T_GET_ID, 0, VIRTIO_BLK_ID_BYTES));
  copy_bytes(id, requests[0].data, VIRTIO_BLK_ID_BYTES);
  print_line("block %u: id %s", number, id);

  enum { SHOWN = 16 };
  expect("status of a read", VIRTIO_BLK_S_OK, perform(disk, VIRTIO_BLK_T_IN, 0, disk->block_size));
  const uint8_t *data = requests[0].data;
  unsigned printable = 0;
  while (printable < SHOWN && data[printable] >= ' ' && data[printable] <= '~') printable++;
  if (printable < SHOWN) return;
  char text[SHOWN + 1] = "";
  copy_bytes(text, data, SHOWN);
  print_line("block %u: begins with %s", number, text);
}

static void test_write_and_read(struct disk *disk) {
  uint64_t sectors[] = {sector_of(disk, FIRST_BLOCK), sector_of(disk, disk->blocks - 1)};
  for (unsigned i = 0; i < COUNT(sectors); i++) write_sectors(disk, sectors[i], disk->block_size);
  for (unsigned i = 0; i < COUNT(sectors); i++) read_back(disk, sectors[i], disk->block_size);
  print_ok(disk, "write and read");
}

// Writes and reads two blocks through descriptors that are cut like that.
static void test_cuts(struct disk *disk, uint64_t block, const struct cuts *cuts, struct virtq_desc *table,
                      const char *what) {
  struct virtqueue *queue = &disk->queues[0];
  uint64_t sector = sector_of(disk, block);
  uint32_t length = 2 * disk->block_size;
  fill_sectors(requests[0].data, sector, length);
  uint8_t status = perform_cut(queue, VIRTIO_BLK_T_OUT, sector, length, cuts, table);
  expect("status of a write", VIRTIO_BLK_S_OK, status);
  read_back(disk, sector, length);
  fill_bytes(requests[0].data, 0, length);
  status = perform_cut(queue, VIRTIO_BLK_T_IN, sector, length, cuts, table);
  expect("status of a read", VIRTIO_BLK_S_OK, status);
  check_sectors(requests[0].data, sector, length);
  print_ok(disk, what);
}

static uint32_t random_number(void) {
  static uint32_t state = 1;
  state = state * 1664525 + 1013904223;
  return state;
}

// Many requests at once, in an order that is not the disk's, with one kick each.
static void test_in_flight(struct disk *disk) {
  struct virtqueue *queue = &disk->queues[0];
  uint64_t blocks[TEST_IN_FLIGHT];
  uint16_t heads[TEST_IN_FLIGHT];
  unsigned count = queue->size / 3 < TEST_IN_FLIGHT ? queue->size / 3 : TEST_IN_FLIGHT;
  // Different ones: the i-th is somewhere in the i-th part of what is there, from the last part on.
  uint64_t stride = (disk->blocks - 1 - IN_FLIGHT) / count;
  for (unsigned i = 0; i < count; i++) {
    blocks[i] = IN_FLIGHT + (count - 1 - i) * stride + random_number() % stride;
  }
  for (uint32_t type = VIRTIO_BLK_T_OUT + 1; type-- > VIRTIO_BLK_T_IN;) {
    for (unsigned i = 0; i < count; i++) {
      uint64_t sector = sector_of(disk, blocks[i]);
      if (type == VIRTIO_BLK_T_OUT) fill_sectors(requests[i].data, sector, disk->block_size);
      else fill_bytes(requests[i].data, 0, disk->block_size);
      heads[i] = prepare(queue, &requests[i], type, sector, disk->block_size, NULL, NULL);
      virtqueue_offer(queue, heads[i]);
      virtqueue_kick(queue);
    }
    for (unsigned done = 0; done < count; done++) {
      struct virtq_used_elem element = virtqueue_wait(queue);
      unsigned i = 0;
      while (i < count && heads[i] != element.id) i++;
      if (i == count) fail("one of the chains in flight expected as used got %u", element.id);
      expect("status of one of many requests", VIRTIO_BLK_S_OK, *status_of(&requests[i], disk->block_size));
      check_written(type, disk->block_size, element.len);
      if (type == VIRTIO_BLK_T_IN) {
        check_sectors(requests[i].data, sector_of(disk, blocks[i]), disk->block_size);
      }
      virtqueue_release(queue, heads[i]);
      heads[i] = UINT16_MAX;
    }
  }
  print_line("block %u: %u in flight ok", disk->device->number, count);
}

// Discards a block, or makes it zero, between two that have to stay.
static void clear(struct disk *disk, uint32_t type, uint32_t flags, const char *what) {
  uint64_t sector = sector_of(disk, CLEARED);
  uint32_t size = disk->block_size, count = size / SECTOR_SIZE;
  write_sectors(disk, sector, 3 * size);
  *(struct virtio_blk_discard_write_zeroes *)requests[0].data =
      (struct virtio_blk_discard_write_zeroes){sector + count, count, flags};
  uint8_t status = perform(disk, type, 0, sizeof(struct virtio_blk_discard_write_zeroes));
  if (status != VIRTIO_BLK_S_OK) fail("status of %s expected 0 got %u", what, status);
  read_back(disk, sector, size);
  read_back(disk, sector + 2 * count, size);
  if (type == VIRTIO_BLK_T_DISCARD) return;  // now there may be anything
  static const uint8_t zeroes[PAGE];
  fill_bytes(requests[0].data, 1, size);
  expect("status of a read", VIRTIO_BLK_S_OK, perform(disk, VIRTIO_BLK_T_IN, sector + count, size));
  if (!same_bytes(requests[0].data, zeroes, size)) fail("zeroes expected after %s got others", what);
}

static void test_clearing(struct disk *disk) {
  const struct virtio_device *device = disk->device;
  uint32_t count = disk->block_size / SECTOR_SIZE;
  if (device->features & VIRTIO_BLK_F_DISCARD) {
    if (config_read_32(device, max_discard_sectors) < count) fail("max_discard_sectors of a block expected");
    clear(disk, VIRTIO_BLK_T_DISCARD, 0, "DISCARD");
    print_ok(disk, "discard");
  }
  if (device->features & VIRTIO_BLK_F_WRITE_ZEROES) {
    if (config_read_32(device, max_write_zeroes_sectors) < count) {
      fail("max_write_zeroes_sectors of a block expected");
    }
    clear(disk, VIRTIO_BLK_T_WRITE_ZEROES, 0, "WRITE_ZEROES");
    if (config_read_8(device, write_zeroes_may_unmap)) {
      clear(disk, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, "WRITE_ZEROES, UNMAP");
    }
    print_ok(disk, "write zeroes");
  }
}

static void test_errors(struct disk *disk) {
  uint32_t size = disk->block_size;
  uint64_t last = sector_of(disk, disk->blocks - 1), far = -(uint64_t)(size / SECTOR_SIZE);
  uint8_t behind = perform(disk, VIRTIO_BLK_T_IN, disk->sectors, size);
  expect("status of a read behind the end", VIRTIO_BLK_S_IOERR, behind);
  expect("status of a read over the end", VIRTIO_BLK_S_IOERR, perform(disk, VIRTIO_BLK_T_IN, last, 2 * size));
  expect("status of a read up to 2^64", VIRTIO_BLK_S_IOERR, perform(disk, VIRTIO_BLK_T_IN, far, size));
  expect("status of an unknown type", VIRTIO_BLK_S_UNSUPP, perform(disk, NO_TYPE, 0, size));
  if (disk->read_only) {
    uint64_t sector = sector_of(disk, FIRST_BLOCK);
    expect("status of a write", VIRTIO_BLK_S_IOERR, perform(disk, VIRTIO_BLK_T_OUT, sector, size));
  } else {
    uint8_t status = perform(disk, VIRTIO_BLK_T_OUT, last, 2 * size);
    expect("status of a write over the end", VIRTIO_BLK_S_IOERR, status);
    read_back(disk, last, size);
  }
  print_ok(disk, "errors");
}

static void test_queues(struct disk *disk) {
  for (unsigned i = 0; i < disk->queue_count; i++) {
    struct virtqueue *queue = &disk->queues[i];
    uint8_t status = perform_cut(queue, VIRTIO_BLK_T_IN, 0, disk->block_size, NULL, NULL);
    expect("status of a read", VIRTIO_BLK_S_OK, status);
  }
  print_line("block %u: %u queues ok", disk->device->number, disk->queue_count);
}

void block_test(struct virtio_device *device, const uint64_t *arguments) {
  (void)arguments;
  static const struct cuts odd = {7, {3, 13, 1, 511, 37, 300, 2}}, together = {0, {}};
  static struct virtq_desc table[2 * MAX_SEGMENTS];
  struct disk *disk = start(device);
  if (disk->blocks < FEWEST_BLOCKS) fail("at least %u blocks expected got %lu", FEWEST_BLOCKS, disk->blocks);

  show(disk);
  if (!disk->read_only) {
    test_write_and_read(disk);
    test_cuts(disk, SCATTERED, &odd, NULL, "scattered descriptors");
    test_cuts(disk, TOGETHER, &together, NULL, "header and data together");
    if (device->features & VIRTIO_F_INDIRECT_DESC) {
      test_cuts(disk, INDIRECT, &odd, table, "indirect descriptors");
    }
    test_in_flight(disk);
    test_clearing(disk);
  }
  if (device->features & VIRTIO_BLK_F_FLUSH) {
    expect("status of FLUSH", VIRTIO_BLK_S_OK, perform(disk, VIRTIO_BLK_T_FLUSH, 0, 0));
    print_ok(disk, "flush");
  }
  test_errors(disk);
  if (disk->queue_count > 1) test_queues(disk);
  virtio_mmio_expect_interrupt(device);
}

// --- Measurements

// Keeps requests of `length` bytes in flight whose descriptors are ready-made: for the next one only the
// sector changes. `next` gives it, as a multiple of `length`.
static void measure(const char *name, struct disk *disk, uint32_t type, uint32_t length,
                    const uint64_t *arguments, uint64_t (*next)(uint64_t pieces)) {
  struct virtqueue *queue = &disk->queues[0];
  uint64_t count = arguments[0], depth = arguments[1], pieces = disk->sectors * SECTOR_SIZE / length;
  if (!pieces) fail("a disk of at least %u bytes expected", length);
  unsigned most = queue->size / 3 < MAX_IN_FLIGHT ? queue->size / 3 : MAX_IN_FLIGHT;
  if (!depth || depth > most) fail("1 to %u requests in flight expected got %lu", most, depth);
  static struct request *request_of[MAX_QUEUE_SIZE];
  uint16_t heads[MAX_IN_FLIGHT];
  for (unsigned i = 0; i < depth; i++) {
    heads[i] = prepare(queue, &requests[i], type, 0, length, NULL, NULL);
    request_of[heads[i]] = &requests[i];
  }

  uint32_t sectors = length / SECTOR_SIZE;
  uint64_t begin = cycles(), given = 0;
  for (; given < depth && given < count; given++) {
    requests[given].header.sector = next(pieces) * sectors;
    virtqueue_offer(queue, heads[given]);
  }
  virtqueue_kick(queue);
  for (uint64_t done = 0; done < count;) {
    struct virtq_used_elem element = virtqueue_wait(queue);
    do {
      struct request *request = request_of[element.id];
      uint8_t status = *status_of(request, length);
      if (status != VIRTIO_BLK_S_OK) fail("status of a request expected 0 got %u", status);
      done++;
      if (given == count) continue;
      request->header.sector = next(pieces) * sectors;
      virtqueue_offer(queue, element.id);
      given++;
    } while (virtqueue_take(queue, &element));
    virtqueue_kick(queue);
  }
  print_measurement(name, count, count * length, cycles() - begin);
  for (unsigned i = 0; i < depth; i++) virtqueue_release(queue, heads[i]);
}

static uint64_t next_sequential(uint64_t pieces) {
  static uint64_t at;
  if (at >= pieces) at = 0;
  return at++;
}

static uint64_t next_random(uint64_t pieces) { return random_number() * pieces >> 32; }

void block_bench_sequential(struct virtio_device *device, const uint64_t *arguments) {
  measure("bench-block-seq-read", start(device), VIRTIO_BLK_T_IN, MAX_DATA, arguments, next_sequential);
}

void block_bench_random(struct virtio_device *device, const uint64_t *arguments) {
  struct disk *disk = start(device);
  measure("bench-block-rand-read", disk, VIRTIO_BLK_T_IN, RANDOM_BYTES, arguments, next_random);
  if (!disk->read_only) {
    measure("bench-block-rand-write", disk, VIRTIO_BLK_T_OUT, RANDOM_BYTES, arguments, next_random);
  }
}
