/** Reads firmware tables as an operating system does: from guest memory, knowing the specifications only. */

import type { FirmwareTables } from '../../src/firmware/index.js'

const MIB = 2 ** 20

/** The first MiB of a guest that has these tables. */
export function lowMemory({ segments }: FirmwareTables): Buffer {
  const memory = Buffer.alloc(MIB)
  for (const { address, bytes } of segments) memory.set(bytes, address)
  return memory
}

/** Looks for a signature at every 16 bytes, as an OS does. */
export function scan(memory: Buffer, signature: string, from: number): number {
  for (let at = from; at < MIB; at += 16) {
    if (memory.toString('latin1', at, at + signature.length) === signature) return at
  }
  throw new Error(`Expected ${signature} but there is none`)
}

/** The sum of all bytes, modulo 256: 0 in a table that is whole. */
export function sum(bytes: Uint8Array): number {
  return bytes.reduce((total, byte) => (total + byte) & 0xff, 0)
}

/** The ACPI table at an address: header fields and all of its bytes. */
export function tableAt(memory: Buffer, address: number) {
  const length = memory.readUInt32LE(address + 4)
  const bytes = memory.subarray(address, address + length)
  return {
    address,
    signature: bytes.toString('latin1', 0, 4),
    revision: bytes[8]!,
    oemId: bytes.toString('latin1', 10, 16),
    sum: sum(bytes),
    bytes,
  }
}

/** Every table that is found from the root pointer on. */
export function findTables(memory: Buffer) {
  const rsdpAddress = scan(memory, 'RSD PTR ', 0xe0000)
  const rsdp = memory.subarray(rsdpAddress, rsdpAddress + 36)
  const xsdt = tableAt(memory, Number(rsdp.readBigUInt64LE(24)))
  const rsdt = tableAt(memory, rsdp.readUInt32LE(16))
  const list = (bytes: Buffer, size: 4 | 8) =>
    Array.from({ length: (bytes.length - 36) / size }, (_, i) => {
      const at = 36 + i * size
      return size === 4 ? bytes.readUInt32LE(at) : Number(bytes.readBigUInt64LE(at))
    })
  const addresses = list(xsdt.bytes, 8)
  const tables = addresses.map((address) => tableAt(memory, address))
  const bySignature = (signature: string) => tables.find((table) => table.signature === signature)!
  const fadt = bySignature('FACP')
  return {
    rsdp,
    rsdpAddress,
    xsdt,
    rsdt,
    addresses,
    rsdtAddresses: list(rsdt.bytes, 4),
    fadt,
    madt: bySignature('APIC'),
    dsdt: tableAt(memory, fadt.bytes.readUInt32LE(40)),
    facs: memory.subarray(fadt.bytes.readUInt32LE(36), fadt.bytes.readUInt32LE(36) + 64),
  }
}

/** The interrupt controller structures of a MADT, by type. */
export function madtEntries(madt: Buffer): { type: number; bytes: Buffer }[] {
  const entries: { type: number; bytes: Buffer }[] = []
  for (let at = 44; at < madt.length; at += madt[at + 1]!) {
    entries.push({ type: madt[at]!, bytes: madt.subarray(at, at + madt[at + 1]!) })
  }
  return entries
}

/** The MP floating pointer and the configuration table. */
export function findMpTable(memory: Buffer) {
  const pointerAddress = scan(memory, '_MP_', 0xf0000)
  const pointer = memory.subarray(pointerAddress, pointerAddress + 16)
  const tableAddress = pointer.readUInt32LE(4)
  const table = memory.subarray(tableAddress, tableAddress + memory.readUInt16LE(tableAddress + 4))
  const entries: Buffer[] = []
  for (let at = 44; at < table.length; ) {
    const length = table[at] === 0 ? 20 : 8
    entries.push(table.subarray(at, at + length))
    at += length
  }
  return {
    pointer,
    pointerAddress,
    table,
    entries,
    ofType: (type: number) => entries.filter((e) => e[0] === type),
  }
}

/** What AML says, as plain data: `[operator, name, contents]`. */
export type AmlTerm =
  | readonly ['Scope' | 'Device' | 'Method', string, AmlTerm[]]
  | readonly ['Name' | 'Notify', string, AmlData]
export type AmlData = number | string | Buffer | readonly AmlData[]

/** Reads the AML operators that the DSDT needs (ACPI 6.5, chapter 20). */
export function parseAml(aml: Buffer): AmlTerm[] {
  let at = 0
  const byte = () => aml[at++]!
  const packageEnd = () => {
    const start = at
    const lead = byte()
    const following = lead >> 6
    if (following === 0) return start + lead
    let length = lead & 0x0f
    for (let i = 0; i < following; i++) length += byte() * 2 ** (4 + 8 * i)
    return start + length
  }
  const name = () => {
    const root = aml[at] === 0x5c ? String.fromCharCode(byte()) : ''
    const segment = () => {
      at += 4
      return aml.toString('latin1', at - 4, at)
    }
    if (aml[at] !== 0x2e) return root + segment()
    at++
    return `${root}${segment()}.${segment()}`
  }
  const data = (): AmlData => {
    const op = byte()
    if (op <= 1) return op
    const width = { 10: 1, 11: 2, 12: 4 }[op]
    if (width !== undefined) {
      at += width
      return aml.readUIntLE(at - width, width)
    }
    if (op === 0x0d) {
      const end = aml.indexOf(0, at)
      const text = aml.toString('latin1', at, end)
      at = end + 1
      return text
    }
    const end = packageEnd()
    if (op === 0x12) {
      const elements = Array.from({ length: byte() }, data)
      if (at !== end) throw new Error('a package does not end where it says')
      return elements
    }
    if (op !== 0x11) throw new Error(`unknown AML data ${op}`)
    const size = data() as number
    const bytes = aml.subarray(at, at + size)
    at += size
    if (at !== end) throw new Error('a buffer does not end where it says')
    return bytes
  }
  const terms = (end: number): AmlTerm[] => {
    const list: AmlTerm[] = []
    while (at < end) list.push(term())
    if (at !== end) throw new Error('a term list does not end where it says')
    return list
  }
  const term = (): AmlTerm => {
    const op = byte()
    if (op === 0x08) return ['Name', name(), data()]
    if (op === 0x86) return ['Notify', name(), data()]
    if (op !== 0x10 && op !== 0x14 && (op !== 0x5b || byte() !== 0x82)) {
      throw new Error(`unknown AML operator ${op}`)
    }
    const end = packageEnd()
    if (op !== 0x14) return [op === 0x10 ? 'Scope' : 'Device', name(), terms(end)]
    const path = name()
    if (byte() !== 0) throw new Error(`${path} is serialized or has arguments`)
    return ['Method', path, terms(end)]
  }
  return terms(aml.length)
}

/** An `EisaId` as text. */
export function eisaText(id: AmlData): string {
  const swapped = Buffer.alloc(4)
  swapped.writeUInt32LE(id as number)
  const bits = swapped.readUInt32BE()
  const letters = [26, 21, 16].map((shift) => String.fromCharCode(0x40 + ((bits >> shift) & 0x1f)))
  return letters.join('') + (bits & 0xffff).toString(16).toUpperCase().padStart(4, '0')
}

/** The descriptors of a resource template, tag first. */
export function resources(template: AmlData): Buffer[] {
  const bytes = template as Buffer
  const list: Buffer[] = []
  for (let at = 0; ; ) {
    const tag = bytes[at]!
    const length = tag >= 0x80 ? 3 + bytes.readUInt16LE(at + 1) : 1 + (tag & 7)
    list.push(bytes.subarray(at, at + length))
    at += length
    if (tag === 0x79) {
      if (at !== bytes.length) throw new Error('there is something behind the end tag')
      return list
    }
  }
}
