/** Kernel images made in memory, with header fields that may lie, and a look at what a loader made of them. */

import type { BootImage, BootOptions, BootSegment } from '../../src/boot/boot-image.js'
import { NodevisorError } from '../../src/errors.js'
import { MMIO_HOLE_END, ramRegions } from '../../src/memory/layout.js'
import { entryStateOf, failedEntryChecks } from './vm-entry-checks.js'

/** A program header and what it loads. Fields left out are true. */
export interface ElfSegmentSpec {
  readonly bytes: Uint8Array
  /** Virtual address; the physical one unless given. */
  readonly vaddr?: bigint
  readonly paddr: bigint
  readonly memsz?: bigint
  readonly filesz?: bigint
  readonly offset?: bigint
  /** PT_LOAD (1) unless given. */
  readonly type?: number
}

/** An ELF file. Fields left out are true. */
export interface ElfSpec {
  readonly segments: readonly ElfSegmentSpec[]
  /** The first segment's virtual address unless given. */
  readonly entry?: bigint
  readonly type?: number
  readonly machine?: number
  readonly elfClass?: number
  readonly data?: number
  readonly version?: number
  readonly phoff?: bigint
  readonly phentsize?: number
  readonly phnum?: number
}

/** Bytes of the ELF header, and of a program header. */
export const ELF_SIZES = { 32: { header: 52, program: 32 }, 64: { header: 64, program: 56 } } as const

/** Makes an ELF file: header, program headers, the segments' bytes. */
export function makeElf(bits: 32 | 64, spec: ElfSpec): Uint8Array {
  const sizes = ELF_SIZES[bits]
  const headers = sizes.header + spec.segments.length * sizes.program
  const length = headers + spec.segments.reduce((sum, { bytes }) => sum + bytes.length, 0)
  const image = new Uint8Array(length)
  const view = new DataView(image.buffer)
  const word = (at: number, value: bigint) =>
    bits === 32
      ? view.setUint32(at, Number(BigInt.asUintN(32, value)), true)
      : view.setBigUint64(at, BigInt.asUintN(64, value), true)
  const wide = bits / 8

  image.set([0x7f, 0x45, 0x4c, 0x46, spec.elfClass ?? bits / 32, spec.data ?? 1, spec.version ?? 1])
  view.setUint16(16, spec.type ?? 2, true)
  view.setUint16(18, spec.machine ?? (bits === 32 ? 3 : 62), true)
  view.setUint32(20, 1, true)
  const first = spec.segments[0]
  word(24, spec.entry ?? first?.vaddr ?? first?.paddr ?? 0n)
  word(24 + wide, spec.phoff ?? BigInt(sizes.header))
  const counts = 24 + 3 * wide + 4
  view.setUint16(counts, sizes.header, true)
  view.setUint16(counts + 2, spec.phentsize ?? sizes.program, true)
  view.setUint16(counts + 4, spec.phnum ?? spec.segments.length, true)

  let offset = headers
  spec.segments.forEach((segment, index) => {
    const at = sizes.header + index * sizes.program
    const size = BigInt(segment.bytes.length)
    view.setUint32(at, segment.type ?? 1, true)
    // ELF64 has p_flags before the addresses, ELF32 after them: they are not set.
    const fields = bits === 32 ? at + 4 : at + 8
    word(fields, segment.offset ?? BigInt(offset))
    word(fields + wide, segment.vaddr ?? segment.paddr)
    word(fields + 2 * wide, segment.paddr)
    word(fields + 3 * wide, segment.filesz ?? size)
    word(fields + 4 * wide, segment.memsz ?? segment.filesz ?? size)
    image.set(segment.bytes, offset)
    offset += segment.bytes.length
  })
  return image
}

/** A Multiboot 1 header. Fields left out are true. */
export interface MultibootHeaderSpec {
  readonly flags?: number
  readonly checksum?: number
  readonly headerAddr?: number
  readonly loadAddr?: number
  readonly loadEndAddr?: number
  readonly bssEndAddr?: number
  readonly entryAddr?: number
}

/** Makes a Multiboot header with all its optional fields: 48 bytes. */
export function makeMultibootHeader(spec: MultibootHeaderSpec = {}): Uint8Array {
  const flags = spec.flags ?? 3
  const checksum = spec.checksum ?? -(0x1bad_b002 + flags)
  const { headerAddr = 0, loadAddr = 0, loadEndAddr = 0, bssEndAddr = 0, entryAddr = 0 } = spec
  const fields = [0x1bad_b002, flags, checksum, headerAddr, loadAddr, loadEndAddr, bssEndAddr, entryAddr]
  const header = new Uint8Array(48)
  const view = new DataView(header.buffer)
  fields.forEach((value, index) => {
    view.setUint32(index * 4, value >>> 0, true)
  })
  return header
}

/** One after the other. */
export function concat(...parts: readonly Uint8Array[]): Uint8Array {
  return new Uint8Array(Buffer.concat(parts))
}

/** Bytes that differ from one another, so that a shift shows. */
export function pattern(length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, index) => (index * 7 + 1) & 0xff)
}

export const MIB = 0x10_0000

/** Options of a machine with 16 MiB, no command line and no modules, but for what is given. */
export function bootOptions(options: Partial<BootOptions> = {}): BootOptions {
  return { memorySize: 16 * MIB, cmdline: '', modules: [], at: undefined, mode: undefined, ...options }
}

/** A module of text. */
export function textModule(text: string, cmdline: string): { bytes: Uint8Array; cmdline: string } {
  return { bytes: new TextEncoder().encode(text), cmdline }
}

/** The segment of that name. */
export function segmentNamed(image: BootImage, name: string): BootSegment {
  const segment = image.segments.find((segment) => segment.name === name)
  if (segment === undefined) throw new Error(`no segment ${name}`)
  return segment
}

/** Bytes of guest memory as the loader fills it, from `address` on; all in one segment. */
export function peek(image: BootImage, address: number, length: number): DataView {
  const segment = image.segments.find(
    (segment) => address >= segment.address && address + length <= segment.address + segment.size,
  )
  if (segment === undefined) throw new Error(`nothing at 0x${address.toString(16)}`)
  const offset = address - segment.address
  const bytes = new Uint8Array(length)
  bytes.set(segment.bytes.subarray(offset, offset + length))
  return new DataView(bytes.buffer)
}

/** The zero-terminated text at `address`. */
export function peekText(image: BootImage, address: number): string {
  const bytes: number[] = []
  for (let at = address; ; at++) {
    const byte = peek(image, at, 1).getUint8(0)
    if (byte === 0) return new TextDecoder().decode(Uint8Array.from(bytes))
    bytes.push(byte)
  }
}

/** The error that `action` throws; fails if it throws none, or one that is not of this library. */
export function errorOf(action: () => unknown): NodevisorError {
  try {
    action()
  } catch (error) {
    if (error instanceof NodevisorError) return error
    throw error
  }
  throw new Error('Expected an error but there was none')
}

/** What is wrong with a loaded image: empty for one that a machine can start. */
export function faultsOf(image: BootImage, memorySize: number): string[] {
  const faults: string[] = []
  const ram = ramRegions(memorySize).filter(({ start }) => start === 0 || start >= MMIO_HOLE_END)
  let previousEnd = 0
  for (const { name, address, bytes, size } of image.segments) {
    if (!Number.isSafeInteger(address) || !Number.isSafeInteger(size)) faults.push(`${name} is not integral`)
    if (size < 1 || size < bytes.length) faults.push(`${name} has ${bytes.length} bytes but size ${size}`)
    if (address < previousEnd) faults.push(`${name} overlaps what is before it`)
    if (!ram.some(({ start, size: length }) => address >= start && address + size <= start + length)) {
      faults.push(`${name} is not in RAM`)
    }
    previousEnd = address + size
  }
  const kernel = image.segments.filter(({ name }) => name.includes('kernel'))
  if (!kernel.some(({ address, size }) => image.entry >= address && image.entry < address + size)) {
    faults.push(`entry ${image.entry} is not in the kernel`)
  }
  return [...faults, ...failedEntryChecks(entryStateOf(image.state))]
}
