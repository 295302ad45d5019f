import { invalidArgument } from '../errors.js'
import { TableFields } from './table.js'

// ACPI Machine Language: ACPI 6.5, chapter 20; resource descriptors: 6.4

const ZERO_OP = 0x00
const ONE_OP = 0x01
const NAME_OP = 0x08
const BYTE_PREFIX = 0x0a
const WORD_PREFIX = 0x0b
const DWORD_PREFIX = 0x0c
const STRING_PREFIX = 0x0d
const SCOPE_OP = 0x10
const BUFFER_OP = 0x11
const PACKAGE_OP = 0x12
const METHOD_OP = 0x14
const DUAL_NAME_PREFIX = 0x2e
const EXT_OP_PREFIX = 0x5b
const DEVICE_OP = 0x82
const NOTIFY_OP = 0x86
const ROOT_CHAR = '\\'
const NAME_SEGMENT_LENGTH = 4

/** Longest PkgLength of one byte; PkgLengths with two to four bytes have 12, 20 and 28 bits. */
const MAX_SHORT_PKG_LENGTH = 0x3f
const MAX_PKG_LENGTH = 2 ** 28 - 1

const IRQ_DESCRIPTOR = 0x22
const IO_PORT_DESCRIPTOR = 0x47
const END_TAG = 0x79
const MEMORY_32_FIXED_DESCRIPTOR = 0x86
const EXTENDED_INTERRUPT_DESCRIPTOR = 0x89

const IO_DECODES_16_BITS = 1
const MEMORY_READ_WRITE = 1
const INTERRUPT_CONSUMER = 0x01
const INTERRUPT_EDGE = 0x02
const INTERRUPT_SHARED = 0x08

/** Encoded AML: an object, a term or a resource descriptor. */
export type Aml = Uint8Array

/** `Scope (path) { terms }` */
export function scope(path: string, ...terms: Aml[]): Aml {
  return block([SCOPE_OP], join(nameString(path), ...terms))
}

/** `Device (path) { terms }` */
export function device(path: string, ...terms: Aml[]): Aml {
  return block([EXT_OP_PREFIX, DEVICE_OP], join(nameString(path), ...terms))
}

/** `Method (path) { terms }`: without arguments. */
export function method(path: string, ...terms: Aml[]): Aml {
  // MethodFlags: no arguments, not serialized
  return block([METHOD_OP], join(nameString(path), Uint8Array.of(0), ...terms))
}

/** `Notify (path, value)` */
export function notify(path: string, value: number): Aml {
  return join(Uint8Array.of(NOTIFY_OP), nameString(path), integer(value))
}

/** `Name (path, object)` */
export function name(path: string, object: Aml): Aml {
  return join(Uint8Array.of(NAME_OP), nameString(path), object)
}

/** An integer of up to 32 bits, in its shortest encoding. */
export function integer(value: number): Aml {
  if (!Number.isInteger(value) || value < 0 || value > 0xffff_ffff) {
    throw invalidArgument('an AML integer', 'an integer from 0 to 0xffffffff', value)
  }
  const fields = new TableFields()
  if (value === 0) fields.uint8(ZERO_OP)
  else if (value === 1) fields.uint8(ONE_OP)
  else if (value <= 0xff) fields.uint8(BYTE_PREFIX).uint8(value)
  else if (value <= 0xffff) fields.uint8(WORD_PREFIX).uint16(value)
  else fields.uint8(DWORD_PREFIX).uint32(value)
  return fields.toBytes()
}

/** A string of printable ASCII characters. */
export function string(text: string): Aml {
  if (!/^[ -~]*$/.test(text)) throw invalidArgument('an AML string', 'printable ASCII', text)
  return new TableFields().uint8(STRING_PREFIX).text(text).uint8(0).toBytes()
}

/**
 * `EisaId (id)`: three letters and four hexadecimal digits, compressed to 32 bits (ACPI 6.5, 19.6.36), whose
 * bytes are in the order of the letters and digits.
 */
export function eisaId(id: string): Aml {
  if (!/^[A-Z]{3}[0-9A-F]{4}$/.test(id)) {
    throw invalidArgument('an EISA id', "three letters and four hexadecimal digits, as in 'PNP0501',", id)
  }
  const letters = [0, 1, 2].reduce((bits, i) => (bits << 5) | (id.charCodeAt(i) - 0x40), 0)
  const product = Number.parseInt(id.slice(3), 16)
  return Uint8Array.of(DWORD_PREFIX, letters >> 8, letters & 0xff, product >> 8, product & 0xff)
}

/** `Package () { elements }`: at most 255. */
export function packageOf(...elements: Aml[]): Aml {
  return block([PACKAGE_OP], join(Uint8Array.of(elements.length), ...elements))
}

/** `ResourceTemplate () { descriptors }`: a buffer that ends with an end tag. */
export function resourceTemplate(...descriptors: Aml[]): Aml {
  // A checksum of 0 counts as correct (ACPI 6.5, 6.4.2.9).
  const resources = join(...descriptors, Uint8Array.of(END_TAG, 0))
  return block([BUFFER_OP], join(integer(resources.length), resources))
}

/** `IO (Decode16, base, base, 1, length)` */
export function ioPorts(base: number, length: number): Aml {
  return new TableFields()
    .uint8(IO_PORT_DESCRIPTOR)
    .uint8(IO_DECODES_16_BITS)
    .uint16(base) // minimum
    .uint16(base) // maximum
    .uint8(1) // alignment
    .uint8(length)
    .toBytes()
}

/** `IRQNoFlags () { irq }`: an ISA interrupt, edge-triggered and active-high. */
export function irq(irq: number): Aml {
  return new TableFields()
    .uint8(IRQ_DESCRIPTOR)
    .uint16(1 << irq)
    .toBytes()
}

/** `Memory32Fixed (ReadWrite, address, length)` */
export function memory32Fixed(address: number, length: number): Aml {
  return new TableFields()
    .uint8(MEMORY_32_FIXED_DESCRIPTOR)
    .uint16(9) // bytes that follow
    .uint8(MEMORY_READ_WRITE)
    .uint32(address)
    .uint32(length)
    .toBytes()
}

/** What {@link interrupt} describes. */
export interface InterruptResource {
  readonly gsi: number
  readonly trigger: 'edge' | 'level'
  /** Other devices have it too. */
  readonly shared: boolean
}

/** `Interrupt (ResourceConsumer, trigger, ActiveHigh, sharing) { gsi }` */
export function interrupt({ gsi, trigger, shared }: InterruptResource): Aml {
  return new TableFields()
    .uint8(EXTENDED_INTERRUPT_DESCRIPTOR)
    .uint16(6) // bytes that follow
    .uint8(INTERRUPT_CONSUMER | (trigger === 'edge' ? INTERRUPT_EDGE : 0) | (shared ? INTERRUPT_SHARED : 0))
    .uint8(1) // number of interrupts
    .uint32(gsi)
    .toBytes()
}

/** PkgLength for `size` bytes of content; it counts itself (ACPI 6.5, 20.2.4). */
export function pkgLength(size: number): Aml {
  if (size + 1 <= MAX_SHORT_PKG_LENGTH) return Uint8Array.of(size + 1)
  for (let following = 1; following <= 3; following++) {
    const length = size + 1 + following
    if (length >= 2 ** (4 + 8 * following)) continue
    const bytes = [(following << 6) | (length & 0x0f)]
    for (let i = 0; i < following; i++) bytes.push((length >> (4 + 8 * i)) & 0xff)
    return Uint8Array.from(bytes)
  }
  throw invalidArgument('an AML package', `at most ${MAX_PKG_LENGTH} bytes`, size)
}

/** One or two name segments, from the root or from the present scope on; short ones are padded with `_`. */
function nameString(path: string): Aml {
  const match = /^(\\?)([A-Z_][A-Z0-9_]{0,3})(?:\.([A-Z_][A-Z0-9_]{0,3}))?$/.exec(path)
  if (match === null) {
    const expected = `at most ${NAME_SEGMENT_LENGTH} of A-Z, 0-9 and _, or twice that with a dot between,`
    throw invalidArgument('an AML name', expected, path)
  }
  const [, root, first, second] = match as unknown as [string, string, string, string | undefined]
  const fields = new TableFields().text(root === '' ? '' : ROOT_CHAR)
  if (second !== undefined) fields.uint8(DUAL_NAME_PREFIX)
  for (const segment of [first, second ?? '']) {
    if (segment !== '') fields.text(segment.padEnd(NAME_SEGMENT_LENGTH, '_'))
  }
  return fields.toBytes()
}

function block(opcode: readonly number[], content: Aml): Aml {
  return join(Uint8Array.from(opcode), pkgLength(content.length), content)
}

function join(...parts: Aml[]): Aml {
  const fields = new TableFields()
  for (const part of parts) fields.bytes(part)
  return fields.toBytes()
}
