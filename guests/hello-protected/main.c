// Says what the Multiboot loader told it: memory, command line, first module.

#include "debug-exit.h"
#include "multiboot.h"
#include "serial.h"

static void print_memory(const struct boot_info *info) {
  uint64_t end = 0;
  uint32_t at = info->mmap_addr;
  while (at < info->mmap_addr + info->mmap_length) {
    const struct memory_range *range = (const void *)at;
    if (range->type == MEMORY_AVAILABLE && range->addr + range->len > end) end = range->addr + range->len;
    at += range->size + sizeof(range->size);
  }
  serial_print("memory: ");
  serial_print_number((end + 0xfffff) >> 20);
  serial_print(" MiB\n");
}

static void print_module(const struct module *module) {
  serial_print("module ");
  serial_print((const char *)module->string);
  serial_print(": ");
  for (uint32_t at = module->mod_start; at < module->mod_end; at++) serial_write(*(const char *)at);
  serial_print("\n");
}

void main(uint32_t magic, const struct boot_info *info) {
  serial_print("Hello from protected mode\n");
  if (magic != MULTIBOOT_LOADED) {
    serial_print("not started by a Multiboot loader\n");
    debug_exit(1);
  }
  if (info->flags & INFO_MEMORY_MAP) print_memory(info);
  if (info->flags & INFO_CMDLINE) {
    serial_print("command line: ");
    serial_print((const char *)info->cmdline);
    serial_print("\n");
  }
  if ((info->flags & INFO_MODULES) && info->mods_count > 0) print_module((const void *)info->mods_addr);
  debug_exit(EXIT_SUCCESS);
}
