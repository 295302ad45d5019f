import type { Segment } from '../kvm/registers.js'
import { littleEndian, type Processor } from './processor.js'

/** Bytes of an entry in a GDT or LDT. */
const DESCRIPTOR_SIZE = 8
/** Byte of a descriptor with type, S, DPL and P. */
const ACCESS_BYTE = 5
const ACCESSED = 1

/** Selector ("Segment Selectors", Intel SDM vol. 3A): requested privilege level, and which table. */
const SELECTOR_RPL = 3
const SELECTOR_TI = 4

/** Segment types ("Code- and Data-Segment Descriptor Types"). */
export const TYPE_CODE = 8
/** Of code. */
const TYPE_CONFORMING = 4
/** Of data: writable; of code: readable. */
export const TYPE_WRITABLE = 2
export const TYPE_READABLE = 2

export const rpl = (selector: number) => selector & SELECTOR_RPL
/** A selector as the error code of an exception: without RPL ("Error Code"). */
export const selectorError = (selector: number) => selector & ~SELECTOR_RPL
export const isNull = (selector: number) => selectorError(selector) === 0
export const isCode = ({ s, type }: Segment) => s === 1 && (type & TYPE_CODE) !== 0
export const isConforming = ({ type }: Segment) => (type & TYPE_CONFORMING) !== 0

/** Where a descriptor is; `undefined` for one outside its table, and for the null selector. */
function locate(cpu: Processor, selector: number): bigint | undefined {
  const { gdt, ldt } = cpu.special
  const local = (selector & SELECTOR_TI) !== 0
  if (isNull(selector) || (local && (ldt.unusable || !ldt.present))) return undefined
  const { base, limit } = local ? ldt : gdt
  const at = selector & ~(SELECTOR_RPL | SELECTOR_TI)
  return at + DESCRIPTOR_SIZE - 1 > limit ? undefined : base + BigInt(at)
}

/** The segment that a selector stands for ("Segment Descriptors"); `undefined` where its table has none. */
export function readSegment(cpu: Processor, selector: number): Segment | undefined {
  const at = locate(cpu, selector)
  if (at === undefined) return undefined
  const low = littleEndian(cpu.readTable(at, DESCRIPTOR_SIZE))
  const field = (shift: bigint, bits: number) => Number(BigInt.asUintN(bits, low >> shift))
  const g = field(55n, 1)
  const limit = field(0n, 16) | (field(48n, 4) << 16)
  return {
    base: BigInt(field(16n, 24)) | (BigInt(field(56n, 8)) << 24n),
    limit: g === 1 ? ((limit << 12) | 0xfff) >>> 0 : limit,
    selector,
    type: field(40n, 4),
    s: field(44n, 1),
    dpl: field(45n, 2),
    present: field(47n, 1) === 1,
    avl: field(52n, 1),
    l: field(53n, 1),
    db: field(54n, 1),
    g,
    unusable: false,
  }
}

/** A segment as it is once loaded: with the accessed bit, which the descriptor in memory gets too. */
export function markAccessed(cpu: Processor, segment: Segment): Segment {
  if ((segment.type & ACCESSED) !== 0) return segment
  const at = locate(cpu, segment.selector)! + BigInt(ACCESS_BYTE)
  cpu.writeTable(at, cpu.readTable(at, 1)[0]! | ACCESSED)
  return { ...segment, type: segment.type | ACCESSED }
}

/** What a data segment register is after the null selector was loaded. */
export function nullSegment(segment: Segment): Segment {
  return { ...segment, base: 0n, limit: 0, selector: 0, type: 0, present: false, dpl: 0, unusable: true }
}
