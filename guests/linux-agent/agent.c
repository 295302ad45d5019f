/*
 * The agent: runs programs and moves files in a Linux guest, as its host asks over a port of the virtio
 * console. The protocol is in README.md.
 *
 * One thread around ppoll(). Nothing grows with what the host or a program sends: each channel has a buffer
 * for input, which the host may fill only as far as it was given credit, and output is read only where there
 * is room to send it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define VERSION 1
#define DEFAULT_PORT "/dev/virtio-ports/org.nodevisor.agent"
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#define HEADER_SIZE 8
#define MAX_PAYLOAD 65536
/* Most bytes of output in a frame. */
#define PIECE_SIZE 32768
#define INPUT_WINDOW 65536
#define MAX_CHANNELS 64
#define OUTPUT_SIZE (4 * (HEADER_SIZE + PIECE_SIZE))
/* What is kept free for answers: frames that are no output are shorter. */
#define RESERVE 256
/* How long to wait for a port, or for a host, before the next look, in ms. */
#define RETRY 100

enum {
  HELLO = 1,
  SPAWN = 2,
  STDIN = 3,
  STDOUT = 4,
  STDERR = 5,
  CREDIT = 6,
  KILL = 7,
  READ = 8,
  WRITE = 9,
  EXIT = 10,
  FAULT = 11,
};

/* How a channel ended: the first word of EXIT. */
enum { EXITED = 0, SIGNALED = 1, FAILED = 2 };

#define MAGIC "nodevisor agent"
#define MAGIC_SIZE sizeof MAGIC
#define TOKEN_SIZE 16
#define HELLO_SIZE (MAGIC_SIZE + TOKEN_SIZE + 4)

struct output {
  int fd;
  uint32_t credit;
  /* Bytes that are still wanted. */
  uint64_t left;
};

/* A program, or a file that is read or written. */
struct channel {
  /* 0: not in use. */
  uint32_t id;
  /* 0: a file, or a program that has ended. */
  pid_t pid;
  int input_fd;
  uint8_t *input;
  size_t input_length;
  bool input_ended;
  /* Input that is gone, for which the host was not given new credit. */
  uint32_t input_taken;
  /* Standard output, or a file that is read; standard error. */
  struct output outputs[2];
  bool ended;
  uint32_t end_kind;
  uint32_t end_value;
};

static struct channel channels[MAX_CHANNELS];
static unsigned first_channel;
static int port = -1;
/* False: what comes is not understood up to the next HELLO. */
static bool connected;
static uint8_t incoming[HEADER_SIZE + MAX_PAYLOAD];
static size_t incoming_length;
static uint8_t outgoing[OUTPUT_SIZE];
static size_t outgoing_length;

static uint32_t read32(const uint8_t *bytes) {
  return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static void write32(uint8_t *bytes, uint32_t value) {
  for (int i = 0; i < 4; i++) bytes[i] = (uint8_t)(value >> (8 * i));
}

static void close_fd(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

/* ---- To the host ---- */

static size_t room(void) { return OUTPUT_SIZE - outgoing_length; }

static void put_header(uint8_t *header, uint32_t type, uint32_t channel, size_t length) {
  write32(header, type | (uint32_t)length << 8);
  write32(header + 4, channel);
}

/* The caller has made sure that there is room. */
static void send_frame(uint32_t type, uint32_t channel, const void *payload, size_t length) {
  put_header(outgoing + outgoing_length, type, channel, length);
  memcpy(outgoing + outgoing_length + HEADER_SIZE, payload, length);
  outgoing_length += HEADER_SIZE + length;
}

static void send_words(uint32_t type, uint32_t channel, uint32_t first, uint32_t second) {
  uint8_t payload[8];
  write32(payload, first);
  write32(payload + 4, second);
  send_frame(type, channel, payload, sizeof payload);
}

/* ---- Channels ---- */

static struct channel *find_channel(uint32_t id) {
  for (int i = 0; i < MAX_CHANNELS; i++) {
    if (channels[i].id == id) return &channels[i];
  }
  return NULL;
}

static void release_channel(struct channel *channel) {
  close_fd(&channel->input_fd);
  for (int i = 0; i < 2; i++) close_fd(&channel->outputs[i].fd);
  free(channel->input);
  memset(channel, 0, sizeof *channel);
}

/* Those of an earlier host: it is not there to be told, and its programs have nobody to talk to. */
static void release_all(void) {
  for (int i = 0; i < MAX_CHANNELS; i++) {
    if (channels[i].id == 0) continue;
    if (channels[i].pid > 0) kill(-channels[i].pid, SIGKILL);
    release_channel(&channels[i]);
  }
}

/* Nothing more is known of where frames begin. */
static void disconnect(void) {
  release_all();
  connected = false;
  incoming_length = 0;
}

/* The host broke the protocol. */
static void fault(const char *why) {
  send_frame(FAULT, 0, why, strlen(why));
  disconnect();
}

static void end_channel(struct channel *channel, uint32_t kind, uint32_t value) {
  channel->ended = true;
  channel->end_kind = kind;
  channel->end_value = value;
  close_fd(&channel->input_fd);
}

static void end_file(struct channel *channel, int error) {
  for (int i = 0; i < 2; i++) close_fd(&channel->outputs[i].fd);
  end_channel(channel, error == 0 ? EXITED : FAILED, (uint32_t)error);
}

/* A new channel; NULL after an answer that there can be none. */
static struct channel *open_channel(uint32_t id) {
  if (id == 0 || find_channel(id) != NULL) {
    fault("a channel was opened twice");
    return NULL;
  }
  struct channel *channel = find_channel(0);
  uint8_t *input = channel == NULL ? NULL : malloc(INPUT_WINDOW);
  if (input == NULL) {
    send_words(EXIT, id, FAILED, channel == NULL ? EAGAIN : ENOMEM);
    return NULL;
  }
  *channel = (struct channel){.id = id, .input = input, .input_fd = -1};
  for (int i = 0; i < 2; i++) channel->outputs[i] = (struct output){.fd = -1, .left = UINT64_MAX};
  return channel;
}

/* ---- Programs ---- */

/* In the child: becomes the program, or returns with errno set. */
static void become(const int stdio[3], const char *folder, char **arguments, char **environment) {
  setsid();
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  signal(SIGPIPE, SIG_DFL);
  signal(SIGCHLD, SIG_DFL);
  for (int i = 0; i < 3; i++) {
    if (stdio[i] >= 0 && dup2(stdio[i], i) < 0) return;
  }
  if (getenv("PATH") == NULL) setenv("PATH", DEFAULT_PATH, 1);
  for (; *environment != NULL; environment++) putenv(*environment);
  if (*folder != '\0' && chdir(folder) != 0) return;
  execvp(arguments[0], arguments);
}

/* Starts a program in a session of its own. Returns its process, or -1 with errno set. */
static pid_t start(const int stdio[3], const char *folder, char **arguments, char **environment) {
  int report[2];
  if (pipe2(report, O_CLOEXEC) != 0) return -1;
  pid_t pid = fork();
  if (pid == 0) {
    become(stdio, folder, arguments, environment);
    int error = errno;
    if (write(report[1], &error, sizeof error) < 0) _exit(126);
    _exit(127);
  }
  int error = errno;
  close(report[1]);
  if (pid > 0) {
    ssize_t length;
    do length = read(report[0], &error, sizeof error);
    while (length < 0 && errno == EINTR);
    if (length == sizeof error) {
      while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) continue;
      pid = -1;
    }
  }
  close(report[0]);
  errno = error;
  return pid;
}

/* A pipe whose end here does not block. */
static bool make_pipe(int ends[2], int ours) {
  if (pipe2(ends, O_CLOEXEC) != 0) return false;
  fcntl(ends[ours], F_SETFL, fcntl(ends[ours], F_GETFL) | O_NONBLOCK);
  return true;
}

static void start_in_channel(struct channel *channel, const char *folder, char **arguments,
                             char **environment) {
  int pipes[3][2] = {{-1, -1}, {-1, -1}, {-1, -1}};
  bool made = true;
  for (int i = 0; i < 3 && made; i++) made = make_pipe(pipes[i], i == 0 ? 1 : 0);
  channel->input_fd = pipes[0][1];
  channel->outputs[0].fd = pipes[1][0];
  channel->outputs[1].fd = pipes[2][0];
  int theirs[3] = {pipes[0][0], pipes[1][1], pipes[2][1]};
  pid_t pid = made ? start(theirs, folder, arguments, environment) : -1;
  int error = errno;
  for (int i = 0; i < 3; i++) close_fd(&theirs[i]);
  if (pid < 0) end_file(channel, error);
  else channel->pid = pid;
}

/* The next string of a request; NULL if it does not end there. */
static char *next_string(char **at, const char *end) {
  char *text = *at;
  char *zero = memchr(text, 0, (size_t)(end - text));
  if (zero == NULL) return NULL;
  *at = zero + 1;
  return text;
}

static char **next_strings(char **at, const char *end, uint32_t count) {
  /* Each has at least its zero byte. */
  if (count > (size_t)(end - *at)) return NULL;
  char **strings = calloc(count + 1, sizeof *strings);
  for (uint32_t i = 0; strings != NULL && i < count; i++) {
    strings[i] = next_string(at, end);
    if (strings[i] != NULL) continue;
    free(strings);
    return NULL;
  }
  return strings;
}

/* SPAWN: credit of stdout and stderr, number of arguments and variables; folder, arguments, variables. */
static void spawn(uint32_t id, uint8_t *payload, size_t length) {
  if (length < 16) return fault("SPAWN is too short");
  char *at = (char *)payload + 16;
  const char *end = (char *)payload + length;
  uint32_t argument_count = read32(payload + 8);
  char *folder = next_string(&at, end);
  char **arguments = folder == NULL || argument_count == 0 ? NULL : next_strings(&at, end, argument_count);
  char **environment = arguments == NULL ? NULL : next_strings(&at, end, read32(payload + 12));
  struct channel *channel = NULL;
  if (environment == NULL || at != end) fault("SPAWN is malformed");
  else channel = open_channel(id);
  if (channel != NULL) {
    for (int i = 0; i < 2; i++) channel->outputs[i].credit = read32(payload + 4 * i);
    start_in_channel(channel, folder, arguments, environment);
    if (channel->pid > 0) send_words(CREDIT, id, 0, INPUT_WINDOW);
  }
  free(arguments);
  free(environment);
}

/* Takes note of children that ended; PID 1 also gets those that nobody else waits for. */
static void reap(void) {
  int status;
  for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
    for (int i = 0; i < MAX_CHANNELS; i++) {
      struct channel *channel = &channels[i];
      if (channel->id == 0 || channel->pid != pid) continue;
      channel->pid = 0;
      if (WIFSIGNALED(status)) end_channel(channel, SIGNALED, (uint32_t)WTERMSIG(status));
      else end_channel(channel, EXITED, (uint32_t)WEXITSTATUS(status));
      /* Only what it has printed: its children may have the pipe for as long as they like. */
      for (int stream = 0; stream < 2; stream++) {
        int available = 0;
        struct output *output = &channel->outputs[stream];
        if (output->fd >= 0) ioctl(output->fd, FIONREAD, &available);
        output->left = (uint64_t)available;
      }
    }
  }
}

/* ---- Files ---- */

/* Whether it is a number and a path, with its zero byte. */
static bool is_request(const uint8_t *payload, size_t length) {
  return length >= 6 && memchr(payload + 4, 0, length - 4) == payload + length - 1;
}

/* READ: credit; path. */
static void read_file(uint32_t id, uint8_t *payload, size_t length) {
  if (!is_request(payload, length)) return fault("READ is malformed");
  struct channel *channel = open_channel(id);
  if (channel == NULL) return;
  /* Nonblocking, as it may be a FIFO that nobody writes to. */
  channel->outputs[0].fd = open((char *)payload + 4, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  channel->outputs[0].credit = read32(payload);
  if (channel->outputs[0].fd < 0) end_file(channel, errno);
}

/* WRITE: permissions, or all ones for those that files have otherwise; path. */
static void write_file(uint32_t id, uint8_t *payload, size_t length) {
  if (!is_request(payload, length)) return fault("WRITE is malformed");
  struct channel *channel = open_channel(id);
  if (channel == NULL) return;
  uint32_t mode = read32(payload);
  int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  channel->input_fd = open((char *)payload + 4, flags, mode == UINT32_MAX ? 0666 : mode & 07777);
  bool failed = channel->input_fd < 0 || (mode != UINT32_MAX && fchmod(channel->input_fd, mode & 07777) != 0);
  if (failed) end_file(channel, errno);
  else send_words(CREDIT, id, 0, INPUT_WINDOW);
}

/* ---- From the host ---- */

static void take_input(struct channel *channel, const uint8_t *payload, size_t length) {
  if (channel->input_ended || channel->input_length + channel->input_taken + length > INPUT_WINDOW) {
    return fault("there was more input than credit");
  }
  if (length == 0) channel->input_ended = true;
  if (channel->input_fd < 0) {
    /* The program does not read any more: as if it had. */
    channel->input_taken += (uint32_t)length;
    return;
  }
  memcpy(channel->input + channel->input_length, payload, length);
  channel->input_length += length;
}

static void give_credit(struct channel *channel, uint32_t stream, uint32_t bytes) {
  if (stream < 1 || stream > 2 || bytes > UINT32_MAX - channel->outputs[stream - 1].credit) {
    return fault("CREDIT is out of range");
  }
  channel->outputs[stream - 1].credit += bytes;
}

static void kill_channel(struct channel *channel, uint32_t signal_number) {
  if (channel->pid > 0) kill(-channel->pid, (int)signal_number);
  else if (!channel->ended) end_file(channel, ECANCELED);
}

static void hello(const uint8_t *payload) {
  disconnect();
  /* The host looks for the answer, whatever is before it. */
  outgoing_length = 0;
  connected = read32(payload + MAGIC_SIZE + TOKEN_SIZE) == VERSION;
  uint8_t answer[HELLO_SIZE];
  memcpy(answer, payload, sizeof answer);
  write32(answer + MAGIC_SIZE + TOKEN_SIZE, VERSION);
  send_frame(HELLO, 0, answer, sizeof answer);
}

static void handle(uint32_t type, uint32_t id, uint8_t *payload, size_t length) {
  if (type == HELLO) {
    if (length != HELLO_SIZE || memcmp(payload, MAGIC, MAGIC_SIZE) != 0) return fault("HELLO is malformed");
    return hello(payload);
  }
  if (type == SPAWN) return spawn(id, payload, length);
  if (type == READ) return read_file(id, payload, length);
  if (type == WRITE) return write_file(id, payload, length);
  struct channel *channel = id == 0 ? NULL : find_channel(id);
  /* It has ended, which the host did not know yet. */
  bool wanted = channel != NULL && !channel->ended;
  if (type == STDIN) {
    if (wanted) take_input(channel, payload, length);
  } else if (type == CREDIT && length == 8) {
    /* Also of one that ended: the rest of its output. */
    if (channel != NULL) give_credit(channel, read32(payload), read32(payload + 4));
  } else if (type == KILL && length == 4) {
    if (read32(payload) < 1 || read32(payload) > 64) return fault("there is no such signal");
    if (wanted) kill_channel(channel, read32(payload));
  } else {
    fault("there is no such frame");
  }
}

static void drop_incoming(size_t length) {
  incoming_length -= length;
  memmove(incoming, incoming + length, incoming_length);
}

/* Looks for a HELLO in whatever comes. Returns whether there is one at the front. */
static bool find_hello(void) {
  uint8_t start[HEADER_SIZE + MAGIC_SIZE];
  put_header(start, HELLO, 0, HELLO_SIZE);
  memcpy(start + HEADER_SIZE, MAGIC, MAGIC_SIZE);
  uint8_t *found = memmem(incoming, incoming_length, start, sizeof start);
  if (found != NULL) drop_incoming((size_t)(found - incoming));
  else if (incoming_length >= sizeof start) drop_incoming(incoming_length - (sizeof start - 1));
  return found != NULL;
}

/* Handles the frames that have come. Returns false if there was no room for answers to all of them. */
static bool handle_incoming(void) {
  size_t at = 0;
  while (room() >= RESERVE) {
    if (!connected) {
      drop_incoming(at);
      at = 0;
      if (!find_hello()) return true;
    }
    /* Zeros between frames: a new host completes with them what an earlier one has begun. */
    while (at < incoming_length && incoming[at] == 0) at++;
    if (incoming_length - at < HEADER_SIZE) break;
    uint32_t word = read32(incoming + at);
    size_t length = word >> 8;
    size_t kept = incoming_length;
    if (length > MAX_PAYLOAD) {
      fault("a frame is too long");
      length = 0;
    } else if (incoming_length - at < HEADER_SIZE + length) {
      break;
    } else {
      handle(word & 0xff, read32(incoming + at + 4), incoming + at + HEADER_SIZE, length);
    }
    /* After a fault there may be a HELLO in what is behind. */
    incoming_length = kept;
    at += HEADER_SIZE + length;
  }
  drop_incoming(at);
  return room() >= RESERVE;
}

/* ---- The loop ---- */

static void pump_input(struct channel *channel) {
  while (channel->input_fd >= 0 && channel->input_length > 0) {
    ssize_t written = write(channel->input_fd, channel->input, channel->input_length);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0 && errno == EAGAIN) break;
    if (written < 0) {
      if (channel->pid == 0) end_file(channel, errno);
      close_fd(&channel->input_fd);
      written = (ssize_t)channel->input_length;
    }
    channel->input_taken += (uint32_t)written;
    channel->input_length -= (size_t)written;
    memmove(channel->input, channel->input + written, channel->input_length);
  }
  if (channel->input_fd >= 0 && channel->input_ended && channel->input_length == 0) {
    /* That of a network file system may fail only now. */
    int error = close(channel->input_fd) == 0 ? 0 : errno;
    channel->input_fd = -1;
    if (channel->pid == 0) end_file(channel, error);
  }
  if (channel->ended || channel->input_taken == 0 || room() < RESERVE) return;
  send_words(CREDIT, channel->id, 0, channel->input_taken);
  channel->input_taken = 0;
}

static bool can_read(const struct output *output) {
  return output->fd >= 0 && output->credit > 0 && room() >= 2 * RESERVE;
}

/* Sends one piece of a stream. */
static void pump_output(struct channel *channel, int stream) {
  struct output *output = &channel->outputs[stream];
  if (output->left == 0) close_fd(&output->fd);
  if (!can_read(output)) return;
  size_t size = room() - RESERVE - HEADER_SIZE;
  if (size > PIECE_SIZE) size = PIECE_SIZE;
  if (size > output->credit) size = output->credit;
  if (size > output->left) size = (size_t)output->left;
  uint8_t *frame = outgoing + outgoing_length;
  ssize_t length = read(output->fd, frame + HEADER_SIZE, size);
  if (length < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (length <= 0) {
    bool is_file = channel->pid == 0 && !channel->ended;
    int error = length < 0 ? errno : 0;
    close_fd(&output->fd);
    if (is_file) end_file(channel, error);
    return;
  }
  put_header(frame, stream == 0 ? STDOUT : STDERR, channel->id, (size_t)length);
  outgoing_length += HEADER_SIZE + (size_t)length;
  output->credit -= (uint32_t)length;
  output->left -= (uint64_t)length;
  if (output->left == 0) close_fd(&output->fd);
}

static bool has_output(const struct channel *channel) {
  return channel->outputs[0].fd >= 0 || channel->outputs[1].fd >= 0;
}

static void pump_channel(struct channel *channel) {
  pump_input(channel);
  for (int stream = 0; stream < 2; stream++) pump_output(channel, stream);
  if (!channel->ended || has_output(channel) || room() < RESERVE) return;
  send_words(EXIT, channel->id, channel->end_kind, channel->end_value);
  release_channel(channel);
}

static void pump_channels(void) {
  /* Each is the first at times: with the room that one leaves, the last would get none. */
  first_channel = (first_channel + 1) % MAX_CHANNELS;
  for (unsigned i = 0; i < MAX_CHANNELS; i++) {
    struct channel *channel = &channels[(first_channel + i) % MAX_CHANNELS];
    if (channel->id != 0) pump_channel(channel);
  }
}

static void send_outgoing(void) {
  size_t sent = 0;
  while (sent < outgoing_length) {
    ssize_t length = write(port, outgoing + sent, outgoing_length - sent);
    if (length < 0 && errno == EINTR) continue;
    if (length < 0 && errno == EAGAIN) break;
    /* Nobody is there, as reading says, too. */
    sent = length < 0 ? outgoing_length : sent + (size_t)length;
  }
  outgoing_length -= sent;
  memmove(outgoing, outgoing + sent, outgoing_length);
}

/* Reads what the host has sent. Returns false if there is no host. */
static bool receive(void) {
  if (incoming_length == sizeof incoming) return true;
  ssize_t length = read(port, incoming + incoming_length, sizeof incoming - incoming_length);
  if (length > 0) incoming_length += (size_t)length;
  return length > 0 || (length < 0 && (errno == EAGAIN || errno == EINTR));
}

static void add_poll(struct pollfd *polls, int *count, int fd, short events) {
  if (fd >= 0) polls[(*count)++] = (struct pollfd){.fd = fd, .events = events};
}

/* Adds what a channel waits for. Returns whether it has more to do, of which no file descriptor tells. */
static bool poll_channel(const struct channel *channel, struct pollfd *polls, int *count) {
  if (channel->input_length > 0 || channel->input_ended) add_poll(polls, count, channel->input_fd, POLLOUT);
  for (int stream = 0; stream < 2; stream++) {
    const struct output *output = &channel->outputs[stream];
    if (can_read(output)) add_poll(polls, count, output->fd, POLLIN);
  }
  return channel->ended ? !has_output(channel) : channel->input_taken > 0;
}

/* Serves the host until it has gone. */
static void serve(void) {
  sigset_t none;
  sigemptyset(&none);
  for (;;) {
    reap();
    bool handled = handle_incoming();
    pump_channels();
    if (outgoing_length > 0) send_outgoing();

    struct pollfd polls[1 + 3 * MAX_CHANNELS];
    int count = 0;
    bool wants_input = room() >= RESERVE;
    bool busy = wants_input && !handled;
    add_poll(polls, &count, port, (short)((wants_input ? POLLIN : 0) | (outgoing_length > 0 ? POLLOUT : 0)));
    for (int i = 0; i < MAX_CHANNELS; i++) {
      if (channels[i].id != 0 && poll_channel(&channels[i], polls, &count) && wants_input) busy = true;
    }
    struct timespec at_once = {0, 0};
    /* SIGCHLD comes only in here. */
    if (ppoll(polls, (nfds_t)count, busy ? &at_once : NULL, &none) < 0) continue;
    if ((polls[0].revents & (POLLIN | POLLHUP | POLLERR | POLLNVAL)) != 0 && !receive()) return;
  }
}

/* ---- The start ---- */

/* The port's device node where there is no udev to make links: from the names in sysfs. */
static int open_by_name(const char *name) {
  DIR *folder = opendir("/sys/class/virtio-ports");
  if (folder == NULL) return -1;
  int fd = -1;
  for (struct dirent *entry; fd < 0 && (entry = readdir(folder)) != NULL;) {
    if (strncmp(entry->d_name, "vport", 5) != 0) continue;
    char path[512];
    char found[256] = "";
    snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
    FILE *file = fopen(path, "re");
    if (file == NULL) continue;
    if (fgets(found, sizeof found, file) != NULL) found[strcspn(found, "\n")] = '\0';
    fclose(file);
    if (strcmp(found, name) != 0) continue;
    snprintf(path, sizeof path, "/dev/%s", entry->d_name);
    fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  }
  closedir(folder);
  return fd;
}

static int open_port(const char *path) {
  int fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  if (fd >= 0) return fd;
  const char *slash = strrchr(path, '/');
  return open_by_name(slash == NULL ? path : slash + 1);
}

/* Sleeps; a child that ends wakes it, too. */
static void wait_a_little(void) {
  sigset_t none;
  sigemptyset(&none);
  struct timespec retry = {0, RETRY * 1000000L};
  ppoll(NULL, 0, &retry, &none);
  reap();
}

static void serve_path(const char *path) {
  for (;;) {
    port = open_port(path);
    if (port >= 0) {
      serve();
      disconnect();
      outgoing_length = 0;
      close_fd(&port);
    }
    wait_a_little();
  }
}

static void mount_at(const char *type, const char *path) {
  mkdir(path, 0755);
  /* It may be there already, or not in this kernel: what needs it will say so. */
  if (mount(type, path, type, MS_NOSUID, NULL) != 0 && errno != EBUSY) perror(path);
}

/* What PID 1 has to do before anything else can run. */
static void initialize_system(void) {
  mount_at("proc", "/proc");
  mount_at("sysfs", "/sys");
  mount_at("devtmpfs", "/dev");
  mount_at("devpts", "/dev/pts");
  /* Without /dev/console in the initramfs the kernel starts PID 1 with no files at all. */
  int console = open("/dev/console", O_RDWR | O_NOCTTY);
  for (int fd = 0; fd < 3; fd++) {
    if (console >= 0 && fcntl(fd, F_GETFD) < 0) dup2(console, fd);
  }
  if (console > 2) close(console);
}

static int usage(void) {
  fputs("usage: agent [--init] [--fd NUMBER | PORT] [-- PROGRAM [ARGUMENT]...]\n", stderr);
  return 2;
}

static void on_child(int signal_number) { (void)signal_number; }

int main(int count, char **arguments) {
  bool init = false;
  int fd = -1;
  const char *path = NULL;
  int at = 1;
  for (; at < count && strcmp(arguments[at], "--") != 0; at++) {
    char *end = NULL;
    if (strcmp(arguments[at], "--init") == 0) init = true;
    else if (strcmp(arguments[at], "--fd") == 0 && at + 1 < count) {
      fd = (int)strtol(arguments[++at], &end, 10);
      if (end == arguments[at] || *end != '\0' || fcntl(fd, F_GETFL) < 0) return usage();
    } else if (arguments[at][0] != '-' && path == NULL) path = arguments[at];
    else return usage();
  }
  if (fd >= 0 && path != NULL) return usage();

  if (init) initialize_system();
  for (int i = 0; i < 3; i++) {
    /* Pipes must not get these numbers: dup2() would run over them. */
    if (fcntl(i, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) open("/", O_PATH);
  }
  signal(SIGPIPE, SIG_IGN);
  struct sigaction on_sigchld = {.sa_handler = on_child};
  sigaction(SIGCHLD, &on_sigchld, NULL);
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  sigprocmask(SIG_BLOCK, &child, NULL);

  if (at + 1 < count) {
    char *nothing[] = {NULL};
    const int same[3] = {-1, -1, -1};
    if (start(same, "", arguments + at + 1, nothing) < 0) perror(arguments[at + 1]);
  }
  if (fd < 0) serve_path(path == NULL ? DEFAULT_PORT : path);
  port = fd;
  fcntl(port, F_SETFD, FD_CLOEXEC);
  fcntl(port, F_SETFL, fcntl(port, F_GETFL) | O_NONBLOCK);
  serve();
  release_all();
  return 0;
}
