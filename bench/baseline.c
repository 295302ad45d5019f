// What the benchmarks compare with: the same work in C, straight on the ioctls of /dev/kvm, with nothing around it.
//
//   baseline out IMAGE ECX       one `out` exit, mean of all                                nanoseconds
//   baseline posted IMAGE ECX    one `out` that KVM collects (coalesced PIO), mean of all   nanoseconds
//   baseline lifecycle COUNT     create, run to hlt and close a machine, mean of COUNT      nanoseconds
//   baseline loop COUNT          `dec; jnz` COUNT times, on the host                        cycles of the TSC
//   baseline line COUNT          an edge by KVM_IRQ_LINE, to the guest's handler, median    nanoseconds
//   baseline irqfd COUNT         the same by an irqfd                                       nanoseconds
//   baseline machines COUNT      keeps COUNT halted machines until its standard input ends  "ready"
//
// The result goes to standard output. IMAGE is a flat real-mode image for 0x7c00. It does `out`s to port 0x10, as
// often as ecx makes it, and ends with one to port 0xf4: the file that the other contestants run, too.

#define _GNU_SOURCE
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "program.h"

enum { COUNTED_PORT = 0x10 };

static const uint8_t HLT = 0xf4;

struct machine {
  int vm, memory_fd, vcpu;
  uint8_t *memory;
  struct kvm_run *run;
};

// A machine with 128 MiB, at the first instruction of `image` in real mode: the ioctls that nodevisor makes.
static struct machine create(const uint8_t *image, size_t size, uint64_t ecx, int irqchip) {
  struct machine machine;
  machine.memory_fd = check(memfd_create("baseline", MFD_CLOEXEC | MFD_ALLOW_SEALING), "memfd_create");
  check(ftruncate(machine.memory_fd, MEMORY_SIZE), "ftruncate");
  check(fcntl(machine.memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), "F_ADD_SEALS");
  machine.memory =
      mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, machine.memory_fd, 0);
  if (machine.memory == MAP_FAILED) die("mmap memory");

  machine.vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
  uint64_t identity_map = IDENTITY_MAP_ADDRESS;
  check(ioctl(machine.vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
  check(ioctl(machine.vm, KVM_SET_TSS_ADDR, TSS_ADDRESS), "KVM_SET_TSS_ADDR");
  struct kvm_userspace_memory_region region = {
      .memory_size = MEMORY_SIZE, .userspace_addr = (uintptr_t)machine.memory};
  check(ioctl(machine.vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
  memcpy(machine.memory + ENTRY, image, size);

  if (irqchip) check(ioctl(machine.vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
  machine.vcpu = check(ioctl(machine.vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
  machine.run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine.vcpu, 0);
  if (machine.run == MAP_FAILED) die("mmap kvm_run");
  check(ioctl(machine.vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
  struct kvm_sregs sregs;
  check(ioctl(machine.vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  check(ioctl(machine.vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
  struct kvm_regs regs = {.rip = ENTRY, .rcx = ecx, .rflags = 2};
  check(ioctl(machine.vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
  return machine;
}

static void destroy(struct machine *machine) {
  munmap(machine->run, run_size);
  close(machine->vcpu);
  close(machine->vm);
  munmap(machine->memory, MEMORY_SIZE);
  close(machine->memory_fd);
}

static void run_to_halt(struct machine *machine) {
  check(ioctl(machine->vcpu, KVM_RUN, 0), "KVM_RUN");
  if (machine->run->exit_reason != KVM_EXIT_HLT) {
    fprintf(stderr, "baseline: expected hlt but KVM exited for reason %u\n", machine->run->exit_reason);
    exit(1);
  }
}

// Takes what KVM has collected since the last time. Returns how many writes to the counted port that is.
static uint64_t drain(struct kvm_coalesced_mmio_ring *ring) {
  const uint32_t entries = (PAGE_SIZE - sizeof *ring) / sizeof ring->coalesced_mmio[0];
  uint64_t writes = 0;
  uint32_t first = ring->first;
  while (first != __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE)) {
    if (ring->coalesced_mmio[first].phys_addr == COUNTED_PORT) writes++;
    first = (first + 1) % entries;
    __atomic_store_n(&ring->first, first, __ATOMIC_RELEASE);
  }
  return writes;
}

// Nanoseconds for each write to the counted port. `posted`: KVM may collect them.
static double time_out(const char *path, uint64_t ecx, int posted) {
  uint8_t image[PAGE_SIZE];
  size_t size = read_image(path, image, sizeof image);
  struct machine machine = create(image, size, ecx, 0);
  struct kvm_run *run = machine.run;
  struct kvm_coalesced_mmio_ring *ring = NULL;
  if (posted) {
    int page = check(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO), "KVM_CAP_COALESCED_MMIO");
    ring = (struct kvm_coalesced_mmio_ring *)((uint8_t *)run + page * PAGE_SIZE);
    struct kvm_coalesced_mmio_zone zone = {.addr = COUNTED_PORT, .size = 1, .pio = 1};
    check(ioctl(machine.vm, KVM_REGISTER_COALESCED_MMIO, &zone), "KVM_REGISTER_COALESCED_MMIO");
  }

  // Every byte that is written goes somewhere, as it would to a device.
  volatile uint8_t device = 0;
  uint64_t writes = 0;
  uint64_t start = nanoseconds();
  for (;;) {
    if (ioctl(machine.vcpu, KVM_RUN, 0) < 0) {
      if (errno == EINTR) continue;
      die("KVM_RUN");
    }
    if (ring != NULL) writes += drain(ring);
    if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT) break;
    device = ((uint8_t *)run)[run->io.data_offset];
    if (run->io.port == EXIT_PORT) break;
    if (run->io.port == COUNTED_PORT) writes++;
  }
  uint64_t time = nanoseconds() - start;
  (void)device;
  if (run->exit_reason != KVM_EXIT_IO || run->io.port != EXIT_PORT) {
    fprintf(stderr, "baseline: expected a write to port 0xf4 but KVM exited for reason %u\n", run->exit_reason);
    exit(1);
  }
  destroy(&machine);
  return (double)time / (double)writes;
}

static double time_lifecycle(uint64_t count) {
  uint64_t start = nanoseconds();
  for (uint64_t i = 0; i < count; i++) {
    struct machine machine = create(&HLT, 1, 0, 0);
    run_to_halt(&machine);
    destroy(&machine);
  }
  return (double)(nanoseconds() - start) / (double)count;
}

// The loop of guests/user-mode/user.c, instruction for instruction.
static double time_loop(uint64_t count) {
  uint64_t start = __builtin_ia32_rdtsc();
  __asm__ volatile("1: dec %0\n\tjnz 1b" : "+r"(count));
  return (double)(__builtin_ia32_rdtsc() - start);
}

// A guest that takes IRQ 5 from the PIC for ever; its handler counts in memory.
enum { IRQ = 5, VECTOR = 0x20 + IRQ, HANDLER = 0x600, COUNTER = 0x500, PAUSE_NANOSECONDS = 100000 };
static const uint8_t WAIT[] = {
    0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x20, 0xe6, 0x21,  // mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al
    0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x01, 0xe6, 0x21,  // mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
    0xb0, 0x00, 0xe6, 0x21, 0xfb, 0xf4, 0xeb, 0xfd,  // mov al, 0; out 0x21, al; sti; 1: hlt; jmp 1b
};
static const uint8_t HANDLE[] = {
    0x50, 0xb0, 0x20, 0xe6, 0x20,        // push ax; mov al, 0x20; out 0x20, al
    0x66, 0xff, 0x06, 0x00, 0x05,        // inc dword [0x500]
    0x58, 0xcf,                          // pop ax; iret
};

static void *run_for_ever(void *machine) {
  while (ioctl(((struct machine *)machine)->vcpu, KVM_RUN, 0) == 0 || errno == EINTR) continue;
  return NULL;
}

static void wait_nanoseconds(uint64_t time) {
  for (uint64_t end = nanoseconds() + time; nanoseconds() < end;) continue;
}

static double time_edges(uint64_t count, int by_irqfd) {
  struct machine machine = create(WAIT, sizeof WAIT, 0, 1);
  struct kvm_regs regs = {.rip = ENTRY, .rsp = ENTRY, .rflags = 2};
  check(ioctl(machine.vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
  memcpy(machine.memory + HANDLER, HANDLE, sizeof HANDLE);
  *(uint32_t *)(machine.memory + 4 * VECTOR) = HANDLER;
  volatile uint32_t *counter = (uint32_t *)(machine.memory + COUNTER);
  int event = check(eventfd(0, EFD_CLOEXEC), "eventfd");
  struct kvm_irqfd irqfd = {.fd = (uint32_t)event, .gsi = IRQ};
  if (by_irqfd) check(ioctl(machine.vm, KVM_IRQFD, &irqfd), "KVM_IRQFD");
  pthread_t thread;
  if (pthread_create(&thread, NULL, run_for_ever, &machine) != 0) die("pthread_create");
  // The guest needs a moment to get to its `hlt`.
  usleep(100000);
  uint64_t *times = calloc(count, sizeof *times);
  for (uint64_t i = 0; i < count; i++) {
    uint32_t before = *counter;
    uint64_t start = nanoseconds();
    if (by_irqfd) {
      check(eventfd_write(event, 1), "write eventfd");
    } else {
      for (unsigned level = 2; level-- > 0;) {
        struct kvm_irq_level line = {.irq = IRQ, .level = level};
        check(ioctl(machine.vm, KVM_IRQ_LINE, &line), "KVM_IRQ_LINE");
      }
    }
    while (*counter == before) continue;
    times[i] = nanoseconds() - start;
    wait_nanoseconds(PAUSE_NANOSECONDS);
  }
  return median(times, count);
}

static void keep_machines(uint64_t count) {
  for (uint64_t i = 0; i < count; i++) {
    struct machine machine = create(&HLT, 1, 0, 0);
    run_to_halt(&machine);
  }
  puts("ready");
  fflush(stdout);
  while (getchar() != EOF) continue;
}

int main(int argc, char **argv) {
  const char *mode = argc > 1 ? argv[1] : "";
  uint64_t count = argc > 2 ? strtoull(argv[argc - 1], NULL, 10) : 0;
  double result;
  if (count == 0) {
    fprintf(stderr, "usage: baseline out|posted IMAGE ECX, baseline lifecycle|loop|line|irqfd|machines COUNT\n");
    return 2;
  }
  if (strcmp(mode, "loop") != 0) open_kvm();
  if (strcmp(mode, "out") == 0 && argc == 4) {
    result = time_out(argv[2], count, 0);
  } else if (strcmp(mode, "posted") == 0 && argc == 4) {
    result = time_out(argv[2], count, 1);
  } else if (strcmp(mode, "lifecycle") == 0) {
    result = time_lifecycle(count);
  } else if (strcmp(mode, "loop") == 0) {
    result = time_loop(count);
  } else if (strcmp(mode, "line") == 0 || strcmp(mode, "irqfd") == 0) {
    result = time_edges(count, strcmp(mode, "irqfd") == 0);
  } else if (strcmp(mode, "machines") == 0) {
    keep_machines(count);
    return 0;
  } else {
    return 2;
  }
  printf("%.1f\n", result);
  return 0;
}
