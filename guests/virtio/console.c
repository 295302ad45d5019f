// The console device (VIRTIO 1.2, 5.3): ports that carry bytes, and messages about them.

#include "drivers.h"
#include "virtqueue.h"

// Feature bits (5.3.3), as masks.
enum { VIRTIO_CONSOLE_F_SIZE = 1 << 0, VIRTIO_CONSOLE_F_MULTIPORT = 1 << 1 };

// Offsets in the configuration space (5.3.4).
enum { cols = 0, rows = 2, max_nr_ports = 4 };

// Queues (5.3.2). Ports from 1 on have the two from 2 + 2 * port on.
enum { receiveq_0 = 0, transmitq_0 = 1, control_receiveq = 2, control_transmitq = 3 };

// Messages (5.3.6.2).
enum {
  VIRTIO_CONSOLE_DEVICE_READY = 0,
  VIRTIO_CONSOLE_DEVICE_ADD = 1,
  VIRTIO_CONSOLE_DEVICE_REMOVE = 2,
  VIRTIO_CONSOLE_PORT_READY = 3,
  VIRTIO_CONSOLE_CONSOLE_PORT = 4,
  VIRTIO_CONSOLE_RESIZE = 5,
  VIRTIO_CONSOLE_PORT_OPEN = 6,
  VIRTIO_CONSOLE_PORT_NAME = 7,
};

struct virtio_console_control {
  uint32_t id;
  uint16_t event, value;
};

enum {
  MAX_CONSOLES = 2,
  MAX_PORTS = 8,
  RECEIVE_BUFFERS = 4,
  RECEIVE_BYTES = 512,
  MESSAGES = 32,  // a device may drop what finds no buffer
  MESSAGE_BYTES = 64,  // a message, then a name or a size
  NAME_BYTES = MESSAGE_BYTES - sizeof(struct virtio_console_control),
  LINE_BYTES = 512,
  BENCH_BYTES = 64 * 1024,
  BENCH_LINE = 64,
  MAX_IN_FLIGHT = 32,
};

// In cycles. The host has said all that it has to say at first if it is silent that long, some 50 ms.
static const uint64_t SILENCE = 1ul << 27;

// Buffers that a queue's device fills, known by the heads of their chains.
struct receiver {
  struct virtqueue queue;
  uint8_t *buffer_of[MAX_QUEUE_SIZE];
  uint32_t buffer_size;
};

struct port {
  bool added, console, open;  // open: at the host's end
  uint16_t columns, lines;
  char name[NAME_BYTES + 1];
  struct receiver receiver;
  struct virtqueue transmitq;
  uint8_t buffers[RECEIVE_BUFFERS][RECEIVE_BYTES];
};

static struct console {
  const struct virtio_device *device;
  bool multiport;
  unsigned port_count;
  struct port ports[MAX_PORTS];
  struct receiver control;
  struct virtqueue control_transmitq;
  uint8_t messages[MESSAGES][MESSAGE_BYTES];
} consoles[MAX_CONSOLES];

// --- Buffers

static void receiver_fill(struct receiver *receiver, uint8_t *buffers, unsigned count, uint32_t size) {
  receiver->buffer_size = size;
  for (unsigned i = 0; i < count && receiver->queue.free_count; i++) {
    struct buffer buffer = {buffers + i * size, size};
    uint16_t head = virtqueue_prepare(&receiver->queue, &buffer, 0, 1, NULL);
    receiver->buffer_of[head] = buffers + i * size;
    virtqueue_offer(&receiver->queue, head);
  }
  virtqueue_kick(&receiver->queue);
}

// Takes a buffer that the device filled, if there is one; receiver_return() lets the device fill it again.
static uint8_t *receive(struct receiver *receiver, struct virtq_used_elem *element) {
  if (!virtqueue_take(&receiver->queue, element)) return NULL;
  if (element->len > receiver->buffer_size) {
    fail("up to %u bytes expected in queue %u got %u", receiver->buffer_size, receiver->queue.index,
         element->len);
  }
  uint8_t *buffer = receiver->buffer_of[element->id];
  if (!buffer) fail("the head of a chain expected in queue %u got %u", receiver->queue.index, element->id);
  return buffer;
}

static void receiver_return(struct receiver *receiver, const struct virtq_used_elem *element) {
  virtqueue_offer(&receiver->queue, element->id);
  virtqueue_kick(&receiver->queue);
}

static void send(struct virtqueue *queue, const void *bytes, uint32_t length) {
  struct buffer buffer = {bytes, length};
  expect("bytes written into what was sent", 0, virtqueue_perform(queue, &buffer, 1, 0, NULL));
}

static void send_text(struct port *port, const char *text) {
  uint32_t length = 0;
  while (text[length]) length++;
  send(&port->transmitq, text, length);
}

// --- Messages

static void send_message(struct console *console, uint32_t id, uint16_t event, uint16_t value) {
  struct virtio_console_control message = {id, event, value};
  send(&console->control_transmitq, &message, sizeof message);
}

static void print_port(const struct console *console, const struct port *port) {
  print_text("console %u port %u: %s", console->device->number, (unsigned)(port - console->ports),
             !port->added ? "removed" : port->open ? "open" : "closed");
  if (port->console) print_text(", console");
  if (port->columns) print_text(", %ux%u", port->columns, port->lines);
  print_line(port->name[0] ? ", named %s" : "", port->name);
}

static void add_port(struct console *console, uint32_t id) {
  bool known = id < console->port_count;
  if (known && !console->ports[id].added) {
    struct port *port = &console->ports[id];
    port->added = true;
    if (port->receiver.queue.in_flight == 0) {
      receiver_fill(&port->receiver, port->buffers[0], RECEIVE_BUFFERS, RECEIVE_BYTES);
    }
  }
  send_message(console, id, VIRTIO_CONSOLE_PORT_READY, known);
  if (known) send_message(console, id, VIRTIO_CONSOLE_PORT_OPEN, 1);
}

// What the device tells about a port. Returns whether print_port() would print something else now.
static bool handle_message(struct console *console, const uint8_t *bytes, uint32_t length) {
  struct virtio_console_control message;
  if (length < sizeof message) fail("messages of at least 8 bytes expected got %u", length);
  copy_bytes(&message, bytes, sizeof message);
  const uint8_t *more = bytes + sizeof message;
  length -= sizeof message;
  if (options.verbose) {
    print_line("# message port %u event %u value %u", message.id, message.event, message.value);
  }

  if (message.event == VIRTIO_CONSOLE_DEVICE_ADD) add_port(console, message.id);
  if (message.id >= console->port_count) return false;
  struct port *port = &console->ports[message.id];
  switch (message.event) {
    case VIRTIO_CONSOLE_DEVICE_ADD:
      return true;
    case VIRTIO_CONSOLE_DEVICE_REMOVE:
      port->added = port->open = false;
      return true;
    case VIRTIO_CONSOLE_CONSOLE_PORT:
      port->console = true;
      return true;
    case VIRTIO_CONSOLE_RESIZE:  // le16 cols, le16 rows
      if (length < 4) fail("a size of 4 bytes expected got %u", length);
      port->columns = more[0] | more[1] << 8;
      port->lines = more[2] | more[3] << 8;
      return true;
    case VIRTIO_CONSOLE_PORT_OPEN:
      port->open = message.value;
      return true;
    case VIRTIO_CONSOLE_PORT_NAME:  // without a zero at its end
      copy_bytes(port->name, more, length);
      port->name[length] = 0;
      return true;
    default:
      fail("an event up to 7 expected got %u", message.event);
  }
}

// Handles all messages there are. Returns how many.
static unsigned handle_messages(struct console *console, bool print_changes) {
  struct virtq_used_elem element;
  unsigned count = 0;
  if (!console->multiport) return 0;
  for (uint8_t *buffer; (buffer = receive(&console->control, &element)); count++) {
    // The buffer goes back first: answers make the device send more.
    uint8_t message[MESSAGE_BYTES];
    copy_bytes(message, buffer, element.len);
    receiver_return(&console->control, &element);
    bool changed = handle_message(console, message, element.len);
    if (changed && print_changes) print_port(console, &console->ports[((uint32_t *)message)[0]]);
  }
  return count;
}

// --- Start

static void read_size(struct console *console) {
  const struct virtio_device *device = console->device;
  uint32_t generation;
  if (!(device->features & VIRTIO_CONSOLE_F_SIZE)) return;
  do {
    generation = virtio_mmio_read(device, ConfigGeneration);
    console->ports[0].columns = config_read_16(device, cols);
    console->ports[0].lines = config_read_16(device, rows);
  } while (generation != virtio_mmio_read(device, ConfigGeneration));
}

static unsigned open_ports(const struct console *console) {
  unsigned count = 0;
  for (unsigned i = 0; i < console->port_count; i++) count += console->ports[i].open;
  return count;
}

// Until as many ports are open as the command line says, or else as long as the device has something to say.
static void greet(struct console *console) {
  send_message(console, 0, VIRTIO_CONSOLE_DEVICE_READY, 1);
  if (options.ports) {
    for (;;) {
      if (handle_messages(console, false)) continue;
      if (open_ports(console) >= options.ports) return;
      if (!virtqueue_has_used(&console->control.queue)) relax();
    }
  }
  for (uint64_t last = cycles(); cycles() - last < SILENCE;) {
    if (handle_messages(console, false)) last = cycles();
  }
}

static struct console *start(struct virtio_device *device) {
  if (device->number >= MAX_CONSOLES) fail("at most %u consoles expected", MAX_CONSOLES);
  struct console *console = &consoles[device->number];
  if (device->started) return console;
  virtio_mmio_negotiate(device, VIRTIO_CONSOLE_F_SIZE | VIRTIO_CONSOLE_F_MULTIPORT);
  fill_bytes(console, 0, sizeof *console);
  console->device = device;
  console->multiport = (device->features & VIRTIO_CONSOLE_F_MULTIPORT) != 0;
  console->port_count = console->multiport ? config_read_32(device, max_nr_ports) : 1;
  if (!console->port_count) fail("max_nr_ports of at least 1 expected got 0");
  if (console->port_count > MAX_PORTS) console->port_count = MAX_PORTS;

  for (unsigned id = 0; id < console->port_count; id++) {
    unsigned first = id ? 2 + 2 * id : receiveq_0;
    virtqueue_setup(&console->ports[id].receiver.queue, device, first);
    virtqueue_setup(&console->ports[id].transmitq, device, first + transmitq_0);
  }
  if (console->multiport) {
    virtqueue_setup(&console->control.queue, device, control_receiveq);
    virtqueue_setup(&console->control_transmitq, device, control_transmitq);
  }
  virtio_mmio_driver_ok(device);

  read_size(console);
  if (console->multiport) {
    receiver_fill(&console->control, console->messages[0], MESSAGES, MESSAGE_BYTES);
    greet(console);
  } else {
    struct port *port = &console->ports[0];
    port->added = port->open = port->console = true;
    receiver_fill(&port->receiver, port->buffers[0], RECEIVE_BUFFERS, RECEIVE_BYTES);
  }
  return console;
}

// --- Tests

void console_test(struct virtio_device *device, const uint64_t *arguments) {
  (void)arguments;
  struct console *console = start(device);
  for (unsigned id = 0; id < console->port_count; id++) {
    struct port *port = &console->ports[id];
    if (!port->added) continue;
    print_port(console, port);
    send_text(port, "hello from port ");
    send_text(port, (char[]){'0' + id, '\n', 0});
  }
  virtio_mmio_expect_interrupt(device);
}

static struct port *port_of(struct console *console, uint64_t id) {
  if (id >= console->port_count || !console->ports[id].added) fail("console port %lu expected", id);
  return &console->ports[id];
}

// The size of a console without messages: a change of it is a change of the configuration space.
static void handle_config_change(struct console *console, struct virtio_device *device) {
  if (!(device->features & VIRTIO_CONSOLE_F_SIZE)) return;
  if (!options.irq && virtio_mmio_read(device, InterruptStatus)) virtio_mmio_interrupt(device->irq);
  if (!device->config_changed) return;
  device->config_changed = false;
  read_size(console);
  print_port(console, &console->ports[0]);
}

// Sends each line back, and what is longer than LINE_BYTES in pieces, until the line `quit`.
void console_echo(struct virtio_device *device, const uint64_t *arguments) {
  static const char quit[] = "quit\n";
  static char line[LINE_BYTES];
  struct console *console = start(device);
  struct port *port = port_of(console, arguments[0]);
  uint32_t length = 0;
  uint64_t echoed = 0;
  for (;;) {
    struct virtq_used_elem element;
    handle_config_change(console, device);
    unsigned messages = handle_messages(console, true);
    uint8_t *buffer = receive(&port->receiver, &element);
    if (!buffer) {
      if (!messages) relax();
      continue;
    }
    for (uint32_t at = 0; at < element.len; at++) {
      char character = line[length++] = buffer[at];
      if (character != '\n' && length < LINE_BYTES) continue;
      if (length == sizeof quit - 1 && same_bytes(line, quit, length)) {
        print_line("console %u port %lu: echoed %lu bytes", device->number, arguments[0], echoed);
        return;
      }
      send(&port->transmitq, line, length);
      echoed += length;
      length = 0;
    }
    receiver_return(&port->receiver, &element);
  }
}

void console_bench(struct virtio_device *device, const uint64_t *arguments) {
  static uint8_t text[BENCH_BYTES];
  uint64_t length = arguments[1], depth = arguments[2];
  struct virtqueue *queue = &port_of(start(device), 0)->transmitq;
  if (!length || length > BENCH_BYTES) fail("buffers of 1 to 65536 bytes expected got %lu", length);
  unsigned most = queue->size < MAX_IN_FLIGHT ? queue->size : MAX_IN_FLIGHT;
  if (!depth || depth > most) fail("1 to %u buffers in flight expected got %lu", most, depth);
  fill_bytes(text, 'x', sizeof text);
  for (unsigned at = BENCH_LINE - 1; at < sizeof text; at += BENCH_LINE) text[at] = '\n';

  uint16_t heads[MAX_IN_FLIGHT];
  struct buffer buffer = {text, length};
  for (unsigned i = 0; i < depth; i++) heads[i] = virtqueue_prepare(queue, &buffer, 1, 0, NULL);
  uint64_t count = (arguments[0] + length - 1) / length, given = 0, begin = cycles();
  for (; given < depth && given < count; given++) virtqueue_offer(queue, heads[given]);
  virtqueue_kick(queue);
  for (uint64_t done = 0; done < count;) {
    struct virtq_used_elem element = virtqueue_wait(queue);
    do {
      done++;
      if (given == count) continue;
      virtqueue_offer(queue, element.id);
      given++;
    } while (virtqueue_take(queue, &element));
    virtqueue_kick(queue);
  }
  print_measurement("bench-console", count, count * length, cycles() - begin);
  for (unsigned i = 0; i < depth; i++) virtqueue_release(queue, heads[i]);
}
