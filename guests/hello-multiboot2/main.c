// Says what the Multiboot 2 loader told it: one tag after the other.

#include "debug-exit.h"
#include "multiboot2.h"
#include "serial.h"

static void print_hex(uint32_t number) {
  serial_print("0x");
  for (int shift = 28; shift >= 0; shift -= 4) serial_write("0123456789abcdef"[number >> shift & 15]);
}

static void print_module(const struct module_tag *module) {
  serial_print("module ");
  serial_print(module->text);
  serial_print(": ");
  for (uint32_t at = module->mod_start; at < module->mod_end; at++) serial_write(*(const char *)at);
  serial_print("\n");
}

static void print_memory_map(const struct memory_map_tag *map) {
  serial_print("memory map: ");
  serial_print_number((map->tag.size - sizeof(*map)) / map->entry_size);
  serial_print(" entries\n");
}

// The names lie in a section that is no part of the program: the loader has loaded it all the same.
static void print_first_section(const struct elf_sections_tag *sections) {
  const struct section *section = (const void *)sections->headers;
  serial_print("first section: ");
  serial_print((const char *)section[sections->shndx].addr + section[1].name);
  serial_print("\n");
}

void main(uint32_t magic, const struct boot_info *info) {
  serial_print("Hello from Multiboot 2\nmagic: ");
  print_hex(magic);
  serial_print("\n");
  if (magic != MULTIBOOT2_LOADED) debug_exit(1);

  const struct tag *tag = (const void *)(info + 1);
  while (tag->type != TAG_END) {
    if (tag->type == TAG_CMDLINE) {
      serial_print("command line: ");
      serial_print(((const struct text_tag *)tag)->text);
      serial_print("\n");
    }
    if (tag->type == TAG_MODULE) print_module((const void *)tag);
    if (tag->type == TAG_MEMORY_MAP) print_memory_map((const void *)tag);
    if (tag->type == TAG_ELF_SECTIONS) print_first_section((const void *)tag);
    uint32_t next = (uint32_t)tag + tag->size;
    tag = (const void *)((next + TAG_ALIGNMENT - 1) / TAG_ALIGNMENT * TAG_ALIGNMENT);
  }
  debug_exit(EXIT_SUCCESS);
}
