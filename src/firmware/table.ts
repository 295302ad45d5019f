// ACPI 6.5, 5.2.6 "System Description Table Header" and 5.2.3.2 "Generic Address Structure"

/** Offset of a table's checksum in its header. */
const CHECKSUM_OFFSET = 9
const HEADER_LENGTH = 36

/** Six characters in ACPI. */
export const OEM_ID = 'NODEVI'
/** Eight characters in ACPI and in the MP specification. */
export const OEM_TABLE_ID = 'NODEVISR'
const OEM_REVISION = 1
const CREATOR_ID = 'NDVR'
const CREATOR_REVISION = 1

/** Address space of I/O ports in a Generic Address Structure. */
const SYSTEM_IO = 1
/** "Access Size" of 1, 2 and 4 bytes. */
const ACCESS_SIZES = { 1: 1, 2: 2, 4: 3 } as const

/** An I/O port register, for a Generic Address Structure. */
export interface PortRegister {
  readonly port: number
  /** Bytes of the register, or of the block of registers. */
  readonly length: number
  /** Bytes of one access. */
  readonly accessSize: keyof typeof ACCESS_SIZES
}

/** Appends a table's fields one after the other, as the specifications list them; little-endian. */
export class TableFields {
  readonly #bytes: number[] = []

  /** Bytes so far: the offset of the next field. */
  get length(): number {
    return this.#bytes.length
  }

  uint8(value: number): this {
    return this.#append(value, 1)
  }

  uint16(value: number): this {
    return this.#append(value, 2)
  }

  uint32(value: number): this {
    return this.#append(value, 4)
  }

  /** @param value - at most 2^53 - 1 */
  uint64(value: number): this {
    return this.#append(value % 2 ** 32, 4).#append(Math.floor(value / 2 ** 32), 4)
  }

  /** ASCII characters, not terminated. */
  text(characters: string): this {
    for (const character of characters) this.uint8(character.charCodeAt(0))
    return this
  }

  bytes(bytes: Iterable<number>): this {
    for (const byte of bytes) this.#bytes.push(byte)
    return this
  }

  /** Reserved bytes, or fields that say "not there". */
  zeros(count: number): this {
    for (let i = 0; i < count; i++) this.#bytes.push(0)
    return this
  }

  /** A Generic Address Structure: 12 bytes. */
  portAddress({ port, length, accessSize }: PortRegister): this {
    return this.uint8(SYSTEM_IO)
      .uint8(8 * length)
      .uint8(0) // register bit offset
      .uint8(ACCESS_SIZES[accessSize])
      .uint64(port)
  }

  toBytes(): Uint8Array {
    return Uint8Array.from(this.#bytes)
  }

  #append(value: number, size: number): this {
    for (let i = 0; i < size; i++) this.#bytes.push(Math.floor(value / 2 ** (8 * i)) & 0xff)
    return this
  }
}

/** The byte that makes the sum of all, modulo 256, zero. */
export function checksum(bytes: Uint8Array): number {
  return -bytes.reduce((sum, byte) => sum + byte, 0) & 0xff
}

/**
 * A system description table: header, then `body`.
 *
 * @param signature - four characters
 */
export function systemTable(signature: string, revision: number, body: TableFields): Uint8Array {
  const table = new TableFields()
    .text(signature)
    .uint32(HEADER_LENGTH + body.length)
    .uint8(revision)
    .uint8(0) // checksum
    .text(OEM_ID)
    .text(OEM_TABLE_ID)
    .uint32(OEM_REVISION)
    .text(CREATOR_ID)
    .uint32(CREATOR_REVISION)
    .bytes(body.toBytes())
    .toBytes()
  table[CHECKSUM_OFFSET] = checksum(table)
  return table
}
