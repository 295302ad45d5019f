// What the benchmark of snapshots compares with: the ioctls that a fork, a reset and a restore cannot do without, with
// nothing around them. The guest is a machine with 128 MiB, of which 64 MiB were written. IRQCHIP is none, split or full.
//
//   snapshots fork IRQCHIP IMAGE COUNT             the first fork, forks, their first exits, closing them
//   snapshots reset IRQCHIP IMAGE COUNT            resets after the guest has written its pages
//   snapshots restore IRQCHIP IMAGE COUNT MEMORY   restores, first exit included, with the file MEMORY for memory
//   snapshots children IRQCHIP IMAGE COUNT         keeps COUNT forks until its standard input ends: "ready"
//
// Medians in nanoseconds go to standard output. IMAGE is a flat real-mode image for 0x7c00 that writes to port 0xf4
// again and again, and may do something in between: the file that nodevisor runs, too.

#define _GNU_SOURCE
#include <linux/types.h>
#include <sys/mman.h>

#include "program.h"

enum {
  FIRST_WRITTEN = 16 << 20,
  WRITTEN_SIZE = 64 << 20,
  MIN_XSAVE_SIZE = 4096,
  MAX_MSRS = 1024,
  IO_APIC_PINS = 24,
  ISA_IRQS = 16,
  CASCADE_IRQ = 2,
  PIT_PIN = 2,
  IA32_TSC = 0x10,
  IA32_TSC_DEADLINE = 0x6e0,
};

enum irqchip { NONE, SPLIT, FULL };

struct machine {
  int vm, vcpu;
  uint8_t *memory;
  struct kvm_run *run;
};

struct msrs {
  struct kvm_msrs header;
  struct kvm_msr_entry entries[MAX_MSRS];
};

// All that nodevisor keeps of a machine with one vCPU, but for its memory and devices.
struct state {
  struct kvm_regs regs;
  struct kvm_sregs sregs;
  struct kvm_xsave *xsave;
  struct kvm_xcrs xcrs;
  struct kvm_debugregs debugregs;
  struct kvm_mp_state mp_state;
  struct kvm_lapic_state lapic;
  struct msrs msrs, deadline;
  struct kvm_vcpu_events events;
  struct kvm_irqchip chips[3];
  struct kvm_pit_state2 pit;
  struct kvm_clock_data clock;
};

static enum irqchip irqchip;
static uint8_t image[PAGE_SIZE];
static size_t image_size;
static int has_xcrs;

// The PIT is on input 2 of the I/O APIC, as on a PC: KVM's own routes have it on input 0.
static void route(int vm) {
  struct kvm_irq_routing *routes = calloc(1, sizeof *routes + 2 * IO_APIC_PINS * sizeof routes->entries[0]);
  for (uint32_t gsi = 0; gsi < IO_APIC_PINS; gsi++) {
    if (gsi == CASCADE_IRQ) continue;
    if (gsi < ISA_IRQS) {
      routes->entries[routes->nr++] = (struct kvm_irq_routing_entry){
          .gsi = gsi,
          .type = KVM_IRQ_ROUTING_IRQCHIP,
          .u.irqchip = {.irqchip = gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, .pin = gsi % 8}};
    }
    routes->entries[routes->nr++] = (struct kvm_irq_routing_entry){
        .gsi = gsi,
        .type = KVM_IRQ_ROUTING_IRQCHIP,
        .u.irqchip = {.irqchip = KVM_IRQCHIP_IOAPIC, .pin = gsi == 0 ? PIT_PIN : gsi}};
  }
  check(ioctl(vm, KVM_SET_GSI_ROUTING, routes), "KVM_SET_GSI_ROUTING");
  free(routes);
}

// A machine whose vCPU has no state yet. `map_flags` are MAP_SHARED or MAP_PRIVATE.
static struct machine create(int memory_fd, int map_flags) {
  struct machine machine;
  machine.memory =
      mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, map_flags | MAP_NORESERVE, memory_fd, 0);
  if (machine.memory == MAP_FAILED) die("mmap memory");
  machine.vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
  uint64_t identity_map = IDENTITY_MAP_ADDRESS;
  check(ioctl(machine.vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
  check(ioctl(machine.vm, KVM_SET_TSS_ADDR, TSS_ADDRESS), "KVM_SET_TSS_ADDR");
  struct kvm_userspace_memory_region region = {
      .memory_size = MEMORY_SIZE, .userspace_addr = (uintptr_t)machine.memory};
  check(ioctl(machine.vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
  if (irqchip == SPLIT) {
    struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {2 * IO_APIC_PINS}};
    check(ioctl(machine.vm, KVM_ENABLE_CAP, &split), "KVM_CAP_SPLIT_IRQCHIP");
  } else if (irqchip == FULL) {
    check(ioctl(machine.vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    route(machine.vm);
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    check(ioctl(machine.vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
  }
  machine.vcpu = check(ioctl(machine.vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
  machine.run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine.vcpu, 0);
  if (machine.run == MAP_FAILED) die("mmap kvm_run");
  check(ioctl(machine.vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
  return machine;
}

static void destroy(struct machine *machine) {
  munmap(machine->run, run_size);
  close(machine->vcpu);
  close(machine->vm);
  munmap(machine->memory, MEMORY_SIZE);
}

static void run_to_exit(struct machine *machine) {
  struct kvm_run *run = machine->run;
  while (ioctl(machine->vcpu, KVM_RUN, 0) < 0) {
    if (errno != EINTR) die("KVM_RUN");
  }
  if (run->exit_reason == KVM_EXIT_IO && run->io.port == EXIT_PORT) return;
  fprintf(stderr, "snapshots: expected a write to 0xf4 but KVM exited for reason %u\n", run->exit_reason);
  exit(1);
}

// An `out` is done once KVM_RUN was called again.
static void finish_exit(struct machine *machine) {
  machine->run->immediate_exit = 1;
  if (ioctl(machine->vcpu, KVM_RUN, 0) == 0 || errno != EINTR) die("KVM_RUN to finish an exit");
  machine->run->immediate_exit = 0;
}

// MSRs that KVM does not list and keeps nevertheless: MTRRs and machine checks.
static int is_msr(uint32_t index) {
  return (index >= 0x200 && index < 0x210) || index == 0x250 || index == 0x258 || index == 0x259 ||
         (index >= 0x268 && index < 0x270) || index == 0x2ff || (index >= 0x400 && index < 0x480);
}

static void add_msr(struct machine *machine, struct state *state, uint32_t index) {
  struct msrs *list = index == IA32_TSC_DEADLINE ? &state->deadline : &state->msrs;
  struct msrs one = {.header.nmsrs = 1, .entries[0].index = index};
  if (index == IA32_TSC || ioctl(machine->vcpu, KVM_GET_MSRS, &one) != 1) return;
  if (list->header.nmsrs == MAX_MSRS) {
    errno = E2BIG;
    die("MSRs");
  }
  list->entries[list->header.nmsrs++] = one.entries[0];
}

static struct state *save(struct machine *machine) {
  struct state *state = calloc(1, sizeof *state);
  int vcpu = machine->vcpu, vm = machine->vm;
  int xsave_size = ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
  state->xsave = calloc(1, xsave_size > MIN_XSAVE_SIZE ? (size_t)xsave_size : MIN_XSAVE_SIZE);
  has_xcrs = ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_XCRS) > 0;
  check(ioctl(vcpu, KVM_GET_MP_STATE, &state->mp_state), "KVM_GET_MP_STATE");
  check(ioctl(vcpu, KVM_GET_REGS, &state->regs), "KVM_GET_REGS");
  check(ioctl(vcpu, KVM_GET_SREGS, &state->sregs), "KVM_GET_SREGS");
  check(ioctl(vcpu, KVM_GET_DEBUGREGS, &state->debugregs), "KVM_GET_DEBUGREGS");
  check(ioctl(vcpu, xsave_size > 0 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, state->xsave), "KVM_GET_XSAVE2");
  if (has_xcrs) check(ioctl(vcpu, KVM_GET_XCRS, &state->xcrs), "KVM_GET_XCRS");
  if (irqchip != NONE) check(ioctl(vcpu, KVM_GET_LAPIC, &state->lapic), "KVM_GET_LAPIC");
  check(ioctl(vcpu, KVM_GET_VCPU_EVENTS, &state->events), "KVM_GET_VCPU_EVENTS");
  struct kvm_msr_list *list = calloc(1, sizeof *list + MAX_MSRS * sizeof list->indices[0]);
  list->nmsrs = MAX_MSRS;
  check(ioctl(kvm, KVM_GET_MSR_INDEX_LIST, list), "KVM_GET_MSR_INDEX_LIST");
  for (uint32_t i = 0; i < list->nmsrs; i++) add_msr(machine, state, list->indices[i]);
  free(list);
  for (uint32_t index = 0x200; index < 0x480; index++) {
    if (is_msr(index)) add_msr(machine, state, index);
  }
  if (irqchip == FULL) {
    for (uint32_t id = 0; id < 3; id++) {
      state->chips[id].chip_id = id;
      check(ioctl(vm, KVM_GET_IRQCHIP, &state->chips[id]), "KVM_GET_IRQCHIP");
    }
    check(ioctl(vm, KVM_GET_PIT2, &state->pit), "KVM_GET_PIT2");
  }
  struct kvm_clock_data clock;
  check(ioctl(vm, KVM_GET_CLOCK, &clock), "KVM_GET_CLOCK");
  state->clock.clock = clock.clock;
  return state;
}

// KVM stops at the first that it refuses, as it may do for those that have their value anyway.
static void set_msrs(int vcpu, const struct msrs *msrs) {
  static struct msrs rest;
  for (uint32_t done = 0; done < msrs->header.nmsrs; done++) {
    rest.header.nmsrs = msrs->header.nmsrs - done;
    memcpy(rest.entries, msrs->entries + done, rest.header.nmsrs * sizeof rest.entries[0]);
    done += (uint32_t)check(ioctl(vcpu, KVM_SET_MSRS, &rest), "KVM_SET_MSRS");
  }
}

static void restore(struct machine *machine, struct state *state) {
  int vcpu = machine->vcpu, vm = machine->vm;
  check(ioctl(vcpu, KVM_SET_SREGS, &state->sregs), "KVM_SET_SREGS");
  check(ioctl(vcpu, KVM_SET_REGS, &state->regs), "KVM_SET_REGS");
  check(ioctl(vcpu, KVM_SET_XSAVE, state->xsave), "KVM_SET_XSAVE");
  if (has_xcrs) check(ioctl(vcpu, KVM_SET_XCRS, &state->xcrs), "KVM_SET_XCRS");
  check(ioctl(vcpu, KVM_SET_DEBUGREGS, &state->debugregs), "KVM_SET_DEBUGREGS");
  check(ioctl(vcpu, KVM_SET_MP_STATE, &state->mp_state), "KVM_SET_MP_STATE");
  if (irqchip != NONE) check(ioctl(vcpu, KVM_SET_LAPIC, &state->lapic), "KVM_SET_LAPIC");
  set_msrs(vcpu, &state->msrs);
  set_msrs(vcpu, &state->deadline);
  check(ioctl(vcpu, KVM_SET_VCPU_EVENTS, &state->events), "KVM_SET_VCPU_EVENTS");
  if (irqchip == FULL) {
    for (int id = 0; id < 3; id++) check(ioctl(vm, KVM_SET_IRQCHIP, &state->chips[id]), "KVM_SET_IRQCHIP");
    check(ioctl(vm, KVM_SET_PIT2, &state->pit), "KVM_SET_PIT2");
  }
  check(ioctl(vm, KVM_SET_CLOCK, &state->clock), "KVM_SET_CLOCK");
}

static int create_memory(void) {
  int fd = check(memfd_create("snapshots", MFD_CLOEXEC), "memfd_create");
  check(ftruncate(fd, MEMORY_SIZE), "ftruncate");
  return fd;
}

// The machine that the others are made from, at its first write to the port, with its memory written.
static struct machine create_parent(int memory_fd) {
  struct machine machine = create(memory_fd, MAP_SHARED);
  memcpy(machine.memory + ENTRY, image, image_size);
  memset(machine.memory + FIRST_WRITTEN, 0x55, WRITTEN_SIZE);
  struct kvm_sregs sregs;
  check(ioctl(machine.vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  check(ioctl(machine.vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
  struct kvm_regs regs = {.rip = ENTRY, .rflags = 2};
  check(ioctl(machine.vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
  run_to_exit(&machine);
  finish_exit(&machine);
  return machine;
}

// From now on the file stays as it is.
static void freeze(struct machine *machine, int memory_fd) {
  int flags = MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED;
  void *memory = mmap(machine->memory, MEMORY_SIZE, PROT_READ | PROT_WRITE, flags, memory_fd, 0);
  if (memory == MAP_FAILED) die("mmap memory");
}

static void time_forks(size_t count) {
  int memory_fd = create_memory();
  struct machine parent = create_parent(memory_fd);
  uint64_t start = nanoseconds();
  freeze(&parent, memory_fd);
  struct state *state = save(&parent);
  struct machine first = create(memory_fd, MAP_PRIVATE);
  restore(&first, state);
  uint64_t first_time = nanoseconds() - start;
  destroy(&first);

  uint64_t *forks = calloc(count, sizeof *forks);
  uint64_t *exits = calloc(count, sizeof *exits);
  uint64_t *closes = calloc(count, sizeof *closes);
  for (size_t i = 0; i < count; i++) {
    uint64_t begin = nanoseconds();
    struct machine child = create(memory_fd, MAP_PRIVATE);
    restore(&child, state);
    uint64_t forked = nanoseconds();
    run_to_exit(&child);
    uint64_t ran = nanoseconds();
    destroy(&child);
    forks[i] = forked - begin;
    exits[i] = ran - forked;
    closes[i] = nanoseconds() - ran;
  }
  printf("%lu %.0f %.0f ", first_time, median(forks, count), median(exits, count));
  printf("%.0f\n", median(closes, count));
}

// linux/fs.h has these from Linux 6.7 on; the headers may be older than the kernel.
struct page_region {
  uint64_t start, end, categories;
};

struct pm_scan_arg {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

enum { MAX_REGIONS = 256, PAGE_IS_FILE = 1 << 2, PAGE_IS_PRESENT = 1 << 3, PAGE_IS_SWAPPED = 1 << 4 };

// Pages of a private mapping that were written, as far as they fit into `regions`. Returns how many regions these are.
static size_t written_pages(int pagemap, uint8_t *memory, struct page_region *regions) {
  struct pm_scan_arg argument = {
      .size = sizeof argument,
      .start = (uintptr_t)memory,
      .end = (uintptr_t)memory + MEMORY_SIZE,
      .vec = (uintptr_t)regions,
      .vec_len = MAX_REGIONS,
      .category_inverted = PAGE_IS_FILE,
      .category_mask = PAGE_IS_FILE,
      .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
      .return_mask = PAGE_IS_PRESENT,
  };
  int found = ioctl(pagemap, _IOWR('f', 16, struct pm_scan_arg), &argument);
  if (found >= 0) return (size_t)found;
  // A kernel before 6.7: an entry for each page.
  static uint64_t entries[MEMORY_SIZE / PAGE_SIZE];
  off_t at = (off_t)((uintptr_t)memory / PAGE_SIZE * sizeof entries[0]);
  if (pread(pagemap, entries, sizeof entries, at) != sizeof entries) die("read pagemap");
  size_t count = 0;
  for (size_t page = 0; page < MEMORY_SIZE / PAGE_SIZE && count < MAX_REGIONS; page++) {
    int is_there = (entries[page] >> 62) != 0, is_file = (entries[page] >> 61) & 1;
    uint64_t start = (uintptr_t)memory + page * PAGE_SIZE;
    if (!is_there || is_file) continue;
    regions[count++] = (struct page_region){.start = start, .end = start + PAGE_SIZE};
  }
  return count;
}

static void time_resets(size_t count) {
  int memory_fd = create_memory();
  struct machine machine = create_parent(memory_fd);
  freeze(&machine, memory_fd);
  struct state *state = save(&machine);
  int pagemap = check(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC), "open pagemap");
  uint64_t *times = calloc(count, sizeof *times);
  for (size_t i = 0; i < count; i++) {
    run_to_exit(&machine);
    finish_exit(&machine);
    uint64_t start = nanoseconds();
    struct page_region regions[MAX_REGIONS];
    size_t found = written_pages(pagemap, machine.memory, regions);
    for (size_t j = 0; j < found; j++) {
      void *page = (void *)(uintptr_t)regions[j].start;
      check(madvise(page, regions[j].end - regions[j].start, MADV_DONTNEED), "madvise");
    }
    restore(&machine, state);
    times[i] = nanoseconds() - start;
  }
  printf("%.0f\n", median(times, count));
}

static void time_restores(size_t count, const char *memory) {
  struct machine parent = create_parent(create_memory());
  struct state *state = save(&parent);
  uint64_t *times = calloc(count, sizeof *times);
  for (size_t i = 0; i < count; i++) {
    uint64_t start = nanoseconds();
    int fd = check(open(memory, O_RDONLY | O_CLOEXEC), memory);
    struct machine machine = create(fd, MAP_PRIVATE);
    close(fd);
    restore(&machine, state);
    run_to_exit(&machine);
    times[i] = nanoseconds() - start;
    destroy(&machine);
  }
  printf("%.0f\n", median(times, count));
}

static void keep_children(size_t count) {
  int memory_fd = create_memory();
  struct machine parent = create_parent(memory_fd);
  freeze(&parent, memory_fd);
  struct state *state = save(&parent);
  puts("parent");
  fflush(stdout);
  // Whoever started this measures before it says to go on.
  if (getchar() == EOF) return;
  for (size_t i = 0; i < count; i++) {
    struct machine child = create(memory_fd, MAP_PRIVATE);
    restore(&child, state);
  }
  puts("ready");
  fflush(stdout);
  while (getchar() != EOF) continue;
}

int main(int argc, char **argv) {
  static const char *const CHIPS[] = {[NONE] = "none", [SPLIT] = "split", [FULL] = "full"};
  const char *mode = argc > 1 ? argv[1] : "";
  size_t count = argc > 4 ? strtoull(argv[4], NULL, 10) : 0;
  if (count == 0) {
    fprintf(stderr, "usage: snapshots fork|reset|children IRQCHIP IMAGE COUNT,\n"
                    "       snapshots restore IRQCHIP IMAGE COUNT MEMORY\n");
    return 2;
  }
  while (irqchip < FULL && strcmp(argv[2], CHIPS[irqchip]) != 0) irqchip++;
  image_size = read_image(argv[3], image, sizeof image);
  open_kvm();
  if (strcmp(mode, "fork") == 0) {
    time_forks(count);
  } else if (strcmp(mode, "reset") == 0) {
    time_resets(count);
  } else if (strcmp(mode, "restore") == 0 && argc == 6) {
    time_restores(count, argv[5]);
  } else if (strcmp(mode, "children") == 0) {
    keep_children(count);
  } else {
    return 2;
  }
  return 0;
}
