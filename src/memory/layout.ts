/** Where things are in guest-physical memory. Each address says why it is there. */

/** The size of a page; memory sizes are multiples of it. */
export const PAGE_SIZE = 0x1000

/** The text screen of a VGA adapter in modes 2 and 3 (IBM VGA, 80×25 cells of two bytes). */
export const TEXT_SCREEN_START = 0xb8000
/** 32 KiB: eight pages of text. */
export const TEXT_SCREEN_SIZE = 0x8000

/**
 * KiB of conventional memory, in the data area that a PC's BIOS leaves (IBM PC AT Technical Reference, 1984, "BIOS Data
 * Area"). Kernels look for an MP table in the last of them, and go astray when there are none.
 */
export const BASE_MEMORY_SIZE = 0x413

/** Where conventional memory ends and the adapters' area begins. */
export const LOW_MEMORY_END = 0xa0000
/** Where memory goes on after the adapters' and the firmware's area: 1 MiB. */
export const HIGH_MEMORY_START = 0x100000

/** A PC's BIOS area, up to 1 MiB: an OS looks here for the ACPI root pointer (ACPI 6.5, 5.2.5.1). */
export const BIOS_AREA_START = 0xe0000

/** RAM stops here and goes on at 4 GiB: APICs, firmware and MMIO devices live in between. */
export const MMIO_HOLE_START = 0xc000_0000
export const MMIO_HOLE_END = 0x1_0000_0000

/** Registers of virtio-mmio devices, one page each: where QEMU's microvm has them. */
export const VIRTIO_MMIO_START = 0xfeb0_0000

/** Where a PC's first I/O APIC is (Intel MultiProcessor Specification 1.4, 3.6.5). */
export const IO_APIC_ADDRESS = 0xfec0_0000
/** Where every local APIC is after reset (Intel SDM vol. 3A, "Local APIC Status and Location"). */
export const LOCAL_APIC_ADDRESS = 0xfee0_0000

/** Three pages that VT-x needs for real mode (KVM_SET_TSS_ADDR); QEMU's and crosvm's choice. */
export const KVM_TSS_ADDRESS = 0xfffb_d000
/** One page for VT-x's identity map in real mode (KVM_SET_IDENTITY_MAP_ADDR), before the TSS. */
export const KVM_IDENTITY_MAP_ADDRESS = 0xfffb_c000

/** A stretch of RAM. */
export interface RamRegion {
  readonly start: number
  readonly size: number
}

/**
 * The stretches of RAM that a machine with `memorySize` bytes has, in ascending order.
 *
 * One from 0 on; a second from 4 GiB on for what does not fit below the MMIO hole; and where memory ends
 * below the text screen, the screen's own 32 KiB.
 */
export function ramRegions(memorySize: number): RamRegion[] {
  const low = Math.min(memorySize, MMIO_HOLE_START)
  const regions: RamRegion[] = [{ start: 0, size: low }]
  if (low < TEXT_SCREEN_START + TEXT_SCREEN_SIZE) {
    const start = Math.max(low, TEXT_SCREEN_START)
    regions.push({ start, size: TEXT_SCREEN_START + TEXT_SCREEN_SIZE - start })
  }
  if (memorySize > low) regions.push({ start: MMIO_HOLE_END, size: memorySize - low })
  return regions
}
