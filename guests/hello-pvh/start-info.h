// What a PVH loader hands over.
// https://xenbits.xen.org/gitweb/?p=xen.git;a=blob;f=xen/include/public/arch-x86/hvm/start_info.h
#pragma once

#include <stdint.h>

enum { START_INFO_MAGIC = 0x336ec578 };

// Addresses are physical, and 0 where there is nothing. All lies below 4 GiB, so the lower half is enough.
struct start_info {
  uint32_t magic;
  uint32_t version;  // from 1 on with the memory map
  uint32_t flags;
  uint32_t nr_modules;
  uint64_t modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr;
  uint32_t memmap_entries;
  uint32_t reserved;
};

struct module {
  uint64_t paddr, size, cmdline_paddr, reserved;
};
