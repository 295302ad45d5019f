// Says what a loader for Linux told it: boot_params, and what it points to.

#include "boot-params.h"
#include "debug-exit.h"
#include "serial.h"

static const uint8_t *params;

static uint8_t byte_at(unsigned offset) { return params[offset]; }
static uint32_t word_at(unsigned offset) { return *(const uint32_t *)(params + offset); }
static uint64_t wide_at(unsigned offset) { return *(const uint64_t *)(params + offset); }

static void print_hex(uint64_t number) {
  int shift = 60;
  while (shift > 0 && !(number >> shift)) shift -= 4;
  serial_print("0x");
  for (; shift >= 0; shift -= 4) serial_write("0123456789abcdef"[number >> shift & 15]);
}

static void print_memory_map(void) {
  const struct e820_entry *entries = (const void *)(params + E820_TABLE);
  for (unsigned index = 0; index < byte_at(E820_ENTRIES); index++) {
    serial_print("memory: ");
    print_hex(entries[index].addr);
    serial_print(" to ");
    print_hex(entries[index].addr + entries[index].size - 1);
    serial_print(", type ");
    serial_print_number(entries[index].type);
    serial_print("\n");
  }
}

static void print_initrd(void) {
  uint64_t address = word_at(RAMDISK_IMAGE) | (uint64_t)word_at(EXT_RAMDISK_IMAGE) << 32;
  uint64_t size = word_at(RAMDISK_SIZE) | (uint64_t)word_at(EXT_RAMDISK_SIZE) << 32;
  uint32_t hash = 0x811c9dc5;  // FNV-1a
  for (uint64_t at = 0; at < size; at++) hash = (hash ^ ((const uint8_t *)address)[at]) * 0x01000193;
  serial_print("initrd: ");
  serial_print_number(size);
  serial_print(" bytes, hash ");
  print_hex(hash);
  serial_print(address >> 32 ? ", above 4 GiB\n" : "\n");
}

static void print_seed(void) {
  uint64_t next = wide_at(SETUP_DATA);
  while (next) {
    const struct setup_data *data = (const void *)next;
    uint32_t used = 0;
    for (uint32_t at = 0; at < data->len; at++) used |= data->data[at];
    if (data->type == SETUP_RNG_SEED && used) {
      serial_print("random seed: ");
      serial_print_number(data->len);
      serial_print(" bytes\n");
    }
    next = data->next;
  }
}

void main(const uint8_t *boot_params) {
  params = boot_params;
  serial_print("Hello from Linux's boot protocol\n");
  if (word_at(HEADER) != HEADER_MAGIC) debug_exit(1);
  serial_print("loader: ");
  print_hex(byte_at(TYPE_OF_LOADER));
  serial_print("\ncommand line: ");
  serial_print((const char *)(uint64_t)word_at(CMD_LINE_PTR));
  serial_print("\n");
  print_memory_map();
  serial_print("screen: mode ");
  serial_print_number(byte_at(ORIG_VIDEO_MODE));
  serial_print(", ");
  serial_print_number(byte_at(ORIG_VIDEO_COLS));
  serial_print("x");
  serial_print_number(byte_at(ORIG_VIDEO_LINES));
  serial_print("\n");
  print_initrd();
  serial_print("ACPI: ");
  serial_print(*(const char *)wide_at(ACPI_RSDP_ADDR) == 'R' ? "yes\n" : "no\n");
  print_seed();
  debug_exit(EXIT_SUCCESS);
}
