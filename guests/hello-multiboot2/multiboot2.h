// The boot information of Multiboot 2, as far as this guest reads it.
// https://www.gnu.org/software/grub/manual/multiboot2/multiboot.html#Boot-information-format
#pragma once

#include <stdint.h>

enum {
  MULTIBOOT2_LOADED = 0x36d76289,
  // Types of tags.
  TAG_END = 0,
  TAG_CMDLINE = 1,
  TAG_MODULE = 3,
  TAG_MEMORY_MAP = 6,
  TAG_ELF_SECTIONS = 9,
  // Each tag begins at a multiple of this.
  TAG_ALIGNMENT = 8,
};

// Addresses are uint32_t, not pointers: the layout is the same whoever compiles this.
struct boot_info {
  uint32_t total_size;
  uint32_t reserved;
};

// What all tags begin with.
struct tag {
  uint32_t type;
  uint32_t size;  // with these 8 bytes, without the padding before the next tag
};

struct text_tag {
  struct tag tag;
  char text[];
};

struct module_tag {
  struct tag tag;
  uint32_t mod_start, mod_end;
  char text[];
};

struct memory_map_tag {
  struct tag tag;
  uint32_t entry_size, entry_version;
};

struct elf_sections_tag {
  struct tag tag;
  uint32_t num, entsize;
  uint32_t shndx;  // the section with the names of sections
  char headers[];
};

// A section header, as a 32-bit ELF file has it.
struct section {
  uint32_t name, type, flags;
  uint32_t addr;  // in memory, for every section
  uint32_t offset, size, link, info, addralign, entsize;
};
