/** The map of guest memory that boot protocols, and fw_cfg, hand over. */

import { HIGH_MEMORY_START, LOW_MEMORY_END, MMIO_HOLE_END, MMIO_HOLE_START, ramRegions } from './layout.js'

// Types of memory. Multiboot and PVH have taken over the numbers of the BIOS's map (ACPI 6.5, chapter 15,
// "Address Range Types").
export const MEMORY_AVAILABLE = 1
export const MEMORY_RESERVED = 2

/** A stretch of guest-physical addresses of one type. */
export interface MemoryRange {
  readonly start: number
  /** In bytes. */
  readonly size: number
  readonly type: typeof MEMORY_AVAILABLE | typeof MEMORY_RESERVED
}

/** RAM, less the adapters' area from 640 KiB to 1 MiB; that area and the MMIO hole are reserved. */
export function makeMemoryMap(memorySize: number): MemoryRange[] {
  const ranges: MemoryRange[] = []
  const add = (type: MemoryRange['type'], start: number, end: number) => {
    if (end > start) ranges.push({ start, size: end - start, type })
  }
  const lowEnd = Math.min(memorySize, MMIO_HOLE_START)
  add(MEMORY_AVAILABLE, 0, Math.min(lowEnd, LOW_MEMORY_END))
  add(MEMORY_RESERVED, LOW_MEMORY_END, HIGH_MEMORY_START)
  add(MEMORY_AVAILABLE, HIGH_MEMORY_START, lowEnd)
  add(MEMORY_RESERVED, MMIO_HOLE_START, MMIO_HOLE_END)
  for (const { start, size } of ramRegions(memorySize)) {
    if (start >= MMIO_HOLE_END) add(MEMORY_AVAILABLE, start, start + size)
  }
  return ranges
}

/** Bytes that {@link writeMemoryRange} writes. */
export const MEMORY_RANGE_SIZE = 20

/** Writes a range as all protocols have it: 64 bits of address, 64 of length, 32 of type. */
export function writeMemoryRange(view: DataView, at: number, { start, size, type }: MemoryRange): void {
  view.setBigUint64(at, BigInt(start), true)
  view.setBigUint64(at + 8, BigInt(size), true)
  view.setUint32(at + 16, type, true)
}

/** What Multiboot calls basic memory information, in KiB: RAM from 0 on, and from 1 MiB to the first hole. */
export function basicMemory(memorySize: number): { readonly lower: number; readonly upper: number } {
  const lowEnd = Math.min(memorySize, MMIO_HOLE_START)
  return {
    lower: Math.min(lowEnd, LOW_MEMORY_END) / 1024,
    upper: Math.max(lowEnd - HIGH_MEMORY_START, 0) / 1024,
  }
}
