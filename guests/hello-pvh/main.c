// Says what the PVH loader told it: memory map, command line, modules.

#include "debug-exit.h"
#include "serial.h"
#include "start-info.h"

static void print_hex(uint32_t number) {
  serial_print("0x");
  for (int shift = 28; shift >= 0; shift -= 4) serial_write("0123456789abcdef"[number >> shift & 15]);
}

static void print_module(const struct module *module) {
  const char *bytes = (const char *)(uint32_t)module->paddr;
  serial_print("module ");
  serial_print((const char *)(uint32_t)module->cmdline_paddr);
  serial_print(": ");
  for (uint32_t at = 0; at < module->size; at++) serial_write(bytes[at]);
  serial_print("\n");
}

void main(const struct start_info *info) {
  serial_print("Hello from PVH\nmagic: ");
  print_hex(info->magic);
  serial_print("\n");
  if (info->magic != START_INFO_MAGIC) debug_exit(1);

  serial_print("version: ");
  serial_print_number(info->version);
  serial_print("\ncommand line: ");
  serial_print((const char *)(uint32_t)info->cmdline_paddr);
  serial_print("\nmemory map: ");
  serial_print_number(info->memmap_entries);
  serial_print(" entries\n");
  const struct module *modules = (const void *)(uint32_t)info->modlist_paddr;
  for (uint32_t index = 0; index < info->nr_modules; index++) print_module(&modules[index]);
  debug_exit(EXIT_SUCCESS);
}
