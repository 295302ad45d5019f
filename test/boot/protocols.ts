/** Images of Multiboot 2 and PVH kernels, with fields that may lie. */

import type { BootImage } from '../../src/boot/boot-image.js'
import { concat, ELF_SIZES, faultsOf } from '../helpers/images.js'

/** Numbers as little-endian 32-bit words. */
export function words(...values: readonly number[]): Uint8Array {
  const bytes = new Uint8Array(values.length * 4)
  const view = new DataView(bytes.buffer)
  values.forEach((value, index) => {
    view.setUint32(index * 4, value >>> 0, true)
  })
  return bytes
}

/** With zeros up to a multiple of `alignment`. */
export function padded(bytes: Uint8Array, alignment = 8): Uint8Array {
  return concat(bytes, new Uint8Array(-bytes.length & (alignment - 1)))
}

/** A tag of a Multiboot 2 header. Fields left out are true. */
export interface HeaderTagSpec {
  readonly type: number
  readonly optional?: boolean
  /** The fields after type, flags and size. */
  readonly fields?: readonly number[]
  readonly size?: number
}

/** A Multiboot 2 header. Fields left out are true. */
export interface Multiboot2HeaderSpec {
  readonly tags?: readonly HeaderTagSpec[]
  /** Whether the end tag is there. */
  readonly end?: boolean
  readonly magic?: number
  readonly architecture?: number
  readonly length?: number
  readonly checksum?: number
}

/** Makes a Multiboot 2 header, 8-aligned in size. */
export function makeMultiboot2Header(spec: Multiboot2HeaderSpec = {}): Uint8Array {
  const { tags = [], end = true, magic = 0xe852_50d6, architecture = 0 } = spec
  const all = end ? [...tags, { type: 0 }] : tags
  const body = concat(
    ...all.map(({ type, optional = false, fields = [], size = 8 + fields.length * 4 }: HeaderTagSpec) =>
      padded(words(type | (optional ? 1 << 16 : 0), size, ...fields)),
    ),
  )
  const length = spec.length ?? 16 + body.length
  const checksum = spec.checksum ?? -(magic + architecture + length)
  return concat(words(magic, architecture, length, checksum), body)
}

/** Makes a note: its name with the zero that ends it. */
export function makeNote(
  name: string,
  type: number,
  descriptor: Uint8Array,
  { alignment = 4, namesz = name.length + 1, descsz = descriptor.length } = {},
): Uint8Array {
  const start = concat(words(namesz, descsz, type), new TextEncoder().encode(`${name}\0`))
  return concat(padded(start, alignment), padded(descriptor, alignment))
}

/** The note of a PVH kernel. */
export function pvhNote(entry: number): Uint8Array {
  return makeNote('Xen', 18, words(entry))
}

/** A section. Fields left out are true: at the end of the file, not loaded. */
export interface SectionSpec {
  readonly bytes?: Uint8Array
  /** SHT_PROGBITS (1) unless given. */
  readonly type?: number
  readonly flags?: bigint
  readonly address?: bigint
  readonly offset?: bigint
  readonly size?: bigint
}

/** Where a class has the fields of a section header. */
export const SECTION_FIELDS = {
  32: { header: 40, flags: 8, addr: 12, offset: 16, size: 20 },
  64: { header: 64, flags: 8, addr: 16, offset: 24, size: 32 },
} as const

/** Adds sections and their headers to an ELF file: the null section, those given. */
export function addSections(
  bits: 32 | 64,
  elf: Uint8Array,
  sections: readonly SectionSpec[],
  lies: { readonly shoff?: bigint; readonly shnum?: number; readonly shentsize?: number } = {},
): Uint8Array {
  const fields = SECTION_FIELDS[bits]
  const contents = concat(padded(elf), ...sections.map(({ bytes }) => bytes ?? new Uint8Array(0)))
  const image = concat(contents, new Uint8Array((sections.length + 1) * fields.header))
  const view = new DataView(image.buffer)
  const wide = (at: number, value: bigint) =>
    bits === 32
      ? view.setUint32(at, Number(BigInt.asUintN(32, value)), true)
      : view.setBigUint64(at, BigInt.asUintN(64, value), true)

  wide(bits === 32 ? 32 : 40, lies.shoff ?? BigInt(contents.length))
  const counts = ELF_SIZES[bits].header - 6
  view.setUint16(counts, lies.shentsize ?? fields.header, true)
  view.setUint16(counts + 2, lies.shnum ?? sections.length + 1, true)
  view.setUint16(counts + 4, sections.length, true)
  let offset = padded(elf).length
  sections.forEach(({ bytes = new Uint8Array(0), type = 1, flags = 0n, address = 0n, ...given }, index) => {
    const header = contents.length + (index + 1) * fields.header
    view.setUint32(header + 4, type, true)
    wide(header + fields.flags, flags)
    wide(header + fields.addr, address)
    wide(header + fields.offset, given.offset ?? BigInt(offset))
    wide(header + fields.size, given.size ?? BigInt(bytes.length))
    offset += bytes.length
  })
  return image
}

/**
 * What is wrong with a loaded image, {@link faultsOf}, but for what the PVH protocol wants: CR0.NE clear.
 * (KVM sets it in the true CR0 of VT-x itself: KVM_VM_CR0_ALWAYS_ON in arch/x86/kvm/vmx/vmx.c.)
 */
export function protocolFaultsOf(image: BootImage, memorySize: number): string[] {
  const faults = faultsOf(image, memorySize)
  return image.format === 'pvh' ? faults.filter((fault) => fault !== 'cr0-fixed: NE is 0') : faults
}
