// The boot information of Multiboot 1, as far as this guest reads it.
// https://www.gnu.org/software/grub/manual/multiboot/multiboot.html#Boot-information-format
#pragma once

#include <stdint.h>

enum {
  MULTIBOOT_LOADED = 0x2badb002,
  // Bits of `flags`: which fields are valid.
  INFO_CMDLINE = 1 << 2,
  INFO_MODULES = 1 << 3,
  INFO_MEMORY_MAP = 1 << 6,
  // Kind of a memory range.
  MEMORY_AVAILABLE = 1,
};

// Addresses are uint32_t, not pointers: the layout is the same whoever compiles this.
struct boot_info {
  uint32_t flags;
  uint32_t mem_lower, mem_upper;  // KiB below, and from, 1 MiB on
  uint32_t boot_device;
  uint32_t cmdline;
  uint32_t mods_count, mods_addr;
  uint32_t syms[4];
  uint32_t mmap_length, mmap_addr;
};

struct module {
  uint32_t mod_start, mod_end;
  uint32_t string;
  uint32_t reserved;
};

struct memory_range {
  uint32_t size;  // of what follows: the next range is `size + 4` bytes on
  uint64_t addr, len;
  uint32_t type;
} __attribute__((packed));
