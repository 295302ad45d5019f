// What of struct boot_params this kernel reads: https://docs.kernel.org/arch/x86/zero-page.html
#pragma once

#include <stdint.h>

enum {
  ORIG_VIDEO_MODE = 0x006,
  ORIG_VIDEO_COLS = 0x007,
  ORIG_VIDEO_LINES = 0x00e,
  ACPI_RSDP_ADDR = 0x070,
  EXT_RAMDISK_IMAGE = 0x0c0,
  EXT_RAMDISK_SIZE = 0x0c4,
  E820_ENTRIES = 0x1e8,
  HEADER = 0x202,
  VERSION = 0x206,
  TYPE_OF_LOADER = 0x210,
  RAMDISK_IMAGE = 0x218,
  RAMDISK_SIZE = 0x21c,
  CMD_LINE_PTR = 0x228,
  SETUP_DATA = 0x250,
  E820_TABLE = 0x2d0,

  HEADER_MAGIC = 0x53726448,  // "HdrS"
  SETUP_RNG_SEED = 9,
};

struct e820_entry {
  uint64_t addr, size;
  uint32_t type;
} __attribute__((packed));

struct setup_data {
  uint64_t next;
  uint32_t type, len;
  uint8_t data[];
};
