/** What the loaders of Multiboot 1 and 2 share. */

import { hex, type NodevisorError } from '../errors.js'
import { TEXT_SCREEN_START } from '../memory/layout.js'
import { ELF_REMEDY, type ElfFile, physicalEntry } from './elf.js'
import { formatError, truncatedError } from './image-reading.js'
import type { ClaimedSegment, Placement } from './placement.js'
import { protectedModeEntry } from './protected-mode.js'

/** The loader's name, as it tells the kernel. */
export const BOOT_LOADER_NAME = 'nodevisor'

/** Claims the memory of an ELF file; returns the physical address of its entry. */
export function claimElf(elf: ElfFile, placement: Placement): number {
  placement.claim(elf.segments, ELF_REMEDY)
  return protectedModeEntry(physicalEntry(elf), 'Multiboot', 'e_entry')
}

/**
 * Where a header without help of ELF says that the kernel goes (Multiboot 3.1.3, Multiboot 2 3.1.5): physical
 * addresses, named as in the specifications.
 */
export interface LoadAddresses {
  readonly headerAddr: number
  readonly loadAddr: number
  /** 0 stands for the end of the image. */
  readonly loadEndAddr: number
  /** 0 stands for "no bss". */
  readonly bssEndAddr: number
  /** Where the image's author finds these fields, for error messages. */
  readonly source: string
}

/** Claims the memory of a kernel whose header, at `headerOffset` of the image, has address fields. */
export function claimByAddresses(
  image: Uint8Array,
  headerOffset: number,
  addresses: LoadAddresses,
  placement: Placement,
): void {
  const { headerAddr, loadAddr, loadEndAddr, bssEndAddr, source } = addresses
  if (loadAddr > headerAddr) {
    throw addressError('load_addr', `at most header_addr (${hex(headerAddr)})`, loadAddr, source)
  }
  const start = headerOffset - (headerAddr - loadAddr)
  if (start < 0) {
    const expected = `at least ${hex(headerAddr - headerOffset)}, where the image's first byte goes`
    throw addressError('load_addr', expected, loadAddr, source)
  }
  const loadEnd = loadEndAddr === 0 ? loadAddr + image.length - start : loadEndAddr
  if (loadEnd < loadAddr) {
    throw addressError('load_end_addr', `0 or at least load_addr (${hex(loadAddr)})`, loadEndAddr, source)
  }
  const size = loadEnd - loadAddr
  if (start + size > image.length) {
    const what = 'the kernel (load_addr, load_end_addr)'
    const remedy = 'set load_end_addr to the end of .data, or to 0'
    throw truncatedError(what, BigInt(start), BigInt(size), image.length, remedy)
  }
  const bssEnd = bssEndAddr === 0 ? loadEnd : bssEndAddr
  if (bssEnd < loadEnd) {
    throw addressError('bss_end_addr', `0 or at least load_end_addr (${hex(loadEnd)})`, bssEndAddr, source)
  }
  const segment: ClaimedSegment = {
    name: 'the kernel',
    address: BigInt(loadAddr),
    bytes: image.subarray(start, start + size),
    size: BigInt(bssEnd - loadAddr),
  }
  placement.claim([segment], 'lower load_addr')
}

/** The error for an address field that contradicts another, or the image. */
export function addressError(
  field: string,
  expected: string,
  received: number,
  source: string,
): NodevisorError {
  return formatError(`${field} ${expected}`, hex(received), `correct ${source}`, { field, received })
}

// The text screen: 80 × 25 cells of 16 bits.
const FRAMEBUFFER_TYPE_EGA_TEXT = 2
const TEXT_COLUMNS = 80
const TEXT_ROWS = 25
const TEXT_CELL_BITS = 16

/** Writes the fields `framebuffer_addr` to `framebuffer_type`, 22 bytes: the text screen. */
export function writeTextFramebuffer(view: DataView, at: number): void {
  view.setBigUint64(at, BigInt(TEXT_SCREEN_START), true)
  view.setUint32(at + 8, (TEXT_COLUMNS * TEXT_CELL_BITS) / 8, true)
  view.setUint32(at + 12, TEXT_COLUMNS, true)
  view.setUint32(at + 16, TEXT_ROWS, true)
  view.setUint8(at + 20, TEXT_CELL_BITS)
  view.setUint8(at + 21, FRAMEBUFFER_TYPE_EGA_TEXT)
}
