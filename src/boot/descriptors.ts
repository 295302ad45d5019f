import type { DescriptorTable, Segment } from '../kvm/registers.js'
import { type Placement, STRUCTURE_ZONES } from './placement.js'
import { taskSegment } from './processor.js'

/** Selectors in the GDT that kernels find, in every mode that has one. */
export const CODE_SELECTOR = 0x08
export const DATA_SELECTOR = 0x10

// Offsets in the page of descriptors.
const TSS_OFFSET = 0x40
const RETURN_STUB_OFFSET = 0xc0
const DESCRIPTORS_SIZE = 0x1000

/** Both the 32-bit and the 64-bit TSS take 104 bytes (SDM vol. 3A, "Task State Segment"). */
const TSS_SIZE = 0x68
/** Offset of its I/O-map base address. At or past the limit it says that there is no bitmap. */
const TSS_IO_MAP_BASE = 0x66

/** `cli; 1: hlt; jmp 1b`, the same bytes in 32-bit and 64-bit code. */
const RETURN_STUB = [0xfa, 0xf4, 0xeb, 0xfd]

/** What {@link placeDescriptors} has placed. */
export interface Descriptors {
  readonly gdt: DescriptorTable
  readonly tr: Segment
  /** Address of code that halts: where a kernel's first function returns to. */
  readonly returnAddress: number
}

/**
 * Places a GDT with the segments `cs` and `data`, each where its selector says, a TSS behind `data`, and the code to
 * return to.
 *
 * @param tssBase - the address to give for the TSS, if not its own
 */
export function placeDescriptors(
  placement: Placement,
  cs: Segment,
  data: Segment,
  tssBase?: number,
): Descriptors {
  const tssSelector = data.selector + 8
  const taskRegister = (descriptorsAddress: number) =>
    taskSegment(tssSelector, tssBase ?? descriptorsAddress + TSS_OFFSET, TSS_SIZE - 1)
  const address = placement.place({
    name: 'descriptors',
    size: DESCRIPTORS_SIZE,
    zones: STRUCTURE_ZONES,
    fill: (at) => {
      const bytes = new Uint8Array(RETURN_STUB_OFFSET + RETURN_STUB.length)
      const view = new DataView(bytes.buffer)
      view.setBigUint64(cs.selector, encodeDescriptor(cs), true)
      view.setBigUint64(data.selector, encodeDescriptor(data), true)
      // In long mode it takes 16 bytes; the upper 8, bits 63:32 of the base, are zero: it lies below 4 GiB.
      view.setBigUint64(tssSelector, encodeDescriptor(taskRegister(at)), true)
      view.setUint16(TSS_OFFSET + TSS_IO_MAP_BASE, TSS_SIZE, true)
      bytes.set(RETURN_STUB, RETURN_STUB_OFFSET)
      return bytes
    },
  })
  const tssDescriptorSize = cs.l === 1 ? 16 : 8
  return {
    gdt: { base: BigInt(address), limit: tssSelector + tssDescriptorSize - 1 },
    tr: taskRegister(address),
    returnAddress: address + RETURN_STUB_OFFSET,
  }
}

/** A segment as its 8 bytes in a descriptor table (SDM vol. 3A, "Segment Descriptors"). */
function encodeDescriptor(segment: Segment): bigint {
  const limit = BigInt(segment.g === 1 ? segment.limit >>> 12 : segment.limit)
  return (
    (limit & 0xffffn) |
    ((segment.base & 0xff_ffffn) << 16n) |
    (BigInt(segment.type) << 40n) |
    (BigInt(segment.s) << 44n) |
    (BigInt(segment.dpl) << 45n) |
    (BigInt(segment.present) << 47n) |
    ((limit >> 16n) << 48n) |
    (BigInt(segment.avl) << 52n) |
    (BigInt(segment.l) << 53n) |
    (BigInt(segment.db) << 54n) |
    (BigInt(segment.g) << 55n) |
    ((segment.base >> 24n) << 56n)
  )
}
