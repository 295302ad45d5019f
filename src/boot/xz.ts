import { crc32 } from 'node:zlib'
import { viewOf } from './image-reading.js'
import { Lzma2Decoder } from './lzma2.js'
import { alignUp } from './placement.js'

// The .xz File Format 1.2.1: https://tukaani.org/xz/xz-file-format.txt. What is here is what the kernel's build makes
// and its own decoder takes: blocks of LZMA2, perhaps behind the filter for x86, checked by CRC32 or not at all.

/** "Header Magic Bytes", 2.1.1.1, without the last two (0x5a, 0). */
export const XZ_MAGIC = 0x587a_37fd
const STREAM_HEADER_SIZE = 12
const CHECK_TYPE = 7
const STREAM_FOOTER_SIZE = 12
/** "YZ", as a little-endian number. */
const FOOTER_MAGIC = 0x5a59
const CHECK_NONE = 0
const CHECK_CRC32 = 1

// 3.1: block header.
/** In place of a block header's size: the index follows, and there are no more blocks. */
const INDEX_INDICATOR = 0
const FLAG_FILTERS = 0x03
const FLAG_COMPRESSED_SIZE = 0x40
const FLAG_UNCOMPRESSED_SIZE = 0x80
const FLAGS_RESERVED = 0x3c
// 5.3: filter ids.
const FILTER_X86 = 0x04
const FILTER_LZMA2 = 0x21

/**
 * Unpacks an .xz stream.
 *
 * @param size - bytes that it unpacks to
 * @throws `Error`, saying why, for input that is damaged, uses other filters or unpacks to another size
 */
export function unpackXz(input: Uint8Array, size: number): Uint8Array {
  const view = viewOf(input)
  if (input.length < STREAM_HEADER_SIZE) throw new Error('it ends in its header')
  if (crc32(input.subarray(6, 8)) !== view.getUint32(8, true)) throw new Error('its header has a wrong CRC32')
  const check = input[CHECK_TYPE]!
  if (check !== CHECK_NONE && check !== CHECK_CRC32) {
    throw new Error(`it is checked in a way (${check}) that Linux does not have; use xz --check=crc32`)
  }

  const output = new Uint8Array(size)
  const sizes: number[] = []
  let written = 0
  let at = STREAM_HEADER_SIZE
  for (;;) {
    const sizeByte = input[at]
    if (sizeByte === undefined) throw new Error('it ends without an index')
    if (sizeByte === INDEX_INDICATOR) break
    const headerSize = (sizeByte + 1) * 4
    const { x86Start } = readBlockHeader(input.subarray(at, at + headerSize), headerSize)
    const { inputEnd, outputEnd } = new Lzma2Decoder(input, at + headerSize, output, written).run()
    const block = output.subarray(written, outputEnd)
    sizes.push(inputEnd - at + (check === CHECK_CRC32 ? 4 : 0), block.length)
    if (x86Start !== undefined) undoX86Filter(block, x86Start)
    written = outputEnd
    at = alignUp(inputEnd, 4)
    if (input.subarray(inputEnd, at).some((byte) => byte !== 0))
      throw new Error('the padding of a block is not 0')
    if (check === CHECK_CRC32) {
      if (at + 4 > input.length) throw new Error('it ends in a CRC32')
      if (crc32(block) !== view.getUint32(at, true)) throw new Error('a block has a wrong CRC32')
      at += 4
    }
  }
  checkEnd(input, at, sizes)
  if (written !== size) throw new Error(`it unpacks to ${written} bytes, not ${size}`)
  return output
}

/**
 * Checks index (4) and footer (2.1.2).
 *
 * @param sizes - of each block: packed, without padding, and unpacked
 */
function checkEnd(input: Uint8Array, start: number, sizes: readonly number[]): void {
  const index = [INDEX_INDICATOR, ...[sizes.length / 2, ...sizes].flatMap(encodeInteger)]
  while (index.length % 4 !== 0) index.push(0)
  const crcAt = start + index.length
  const footerAt = crcAt + 4
  if (footerAt + STREAM_FOOTER_SIZE > input.length) throw new Error('it ends before its footer does')
  const isIndex = index.every((byte, offset) => input[start + offset] === byte)
  const view = viewOf(input)
  if (!isIndex || crc32(Uint8Array.from(index)) !== view.getUint32(crcAt, true)) {
    throw new Error('its index is not that of its blocks')
  }
  const flags = input.subarray(footerAt + 4, footerAt + 10)
  const isFooter =
    crc32(flags) === view.getUint32(footerAt, true) &&
    view.getUint32(footerAt + 4, true) === (footerAt - start) / 4 - 1 &&
    view.getUint16(footerAt + 8, true) === view.getUint16(CHECK_TYPE - 1, true) &&
    view.getUint16(footerAt + 10, true) === FOOTER_MAGIC
  if (!isFooter) throw new Error('its footer is damaged')
}

/** 1.2: seven bits a byte, the lowest first. */
function encodeInteger(value: number): number[] {
  const bytes: number[] = []
  for (; value >= 0x80; value = Math.floor(value / 0x80)) bytes.push((value % 0x80) | 0x80)
  return [...bytes, value]
}

/** Checks a block's header. @returns the x86 filter's start offset; undefined without that filter */
function readBlockHeader(header: Uint8Array, size: number): { readonly x86Start: number | undefined } {
  if (header.length < size) throw new Error('it ends in the header of a block')
  const view = viewOf(header)
  if (crc32(header.subarray(0, size - 4)) !== view.getUint32(size - 4, true)) {
    throw new Error('the header of a block has a wrong CRC32')
  }
  const flags = header[1]!
  if ((flags & FLAGS_RESERVED) !== 0) throw new Error(`a block has the flags ${flags}`)
  let at = 2
  // 1.2: multibyte integers, which hold ids and sizes far below 2^53 where they are right.
  const readInteger = () => {
    let value = 0
    for (let scale = 1; ; scale *= 128) {
      const byte = header[at++]
      if (byte === undefined || scale > 2 ** 42) throw new Error('the header of a block is too short')
      value += (byte & 0x7f) * scale
      if (byte < 0x80) return value
    }
  }
  if ((flags & FLAG_COMPRESSED_SIZE) !== 0) readInteger()
  if ((flags & FLAG_UNCOMPRESSED_SIZE) !== 0) readInteger()

  let x86Start: number | undefined
  const last = flags & FLAG_FILTERS
  for (let index = 0; index <= last; index++) {
    const id = readInteger()
    const propertiesSize = readInteger()
    const properties = header.subarray(at, at + propertiesSize)
    at += propertiesSize
    if (at > size - 4) throw new Error('the header of a block is too short')
    const isLast = index === last
    if (isLast && id === FILTER_LZMA2 && propertiesSize === 1) continue
    if (!isLast && id === FILTER_X86 && index === 0 && (propertiesSize === 0 || propertiesSize === 4)) {
      x86Start = propertiesSize === 4 ? viewOf(properties).getUint32(0, true) : 0
      continue
    }
    throw new Error(`a block has the filter 0x${id.toString(16)}, which is not x86 before LZMA2`)
  }
  return { x86Start }
}

/** `call` and `jmp`, both with a relative address of 32 bits. */
const CALL_OR_JUMP = 0xe8
/** Whether the top byte of an address makes it likely one: it is near, before or behind. */
const isNear = (byte: number) => byte === 0x00 || byte === 0xff

/**
 * For the last three bytes' opcodes as bits (the nearest lowest): how far below the top of the address the byte lies that
 * could be the top of theirs, 0 without one; undefined where the encoder has left the address alone.
 */
const OVERLAPS: readonly (number | undefined)[] = [0, 1, 2, undefined, 3, undefined, undefined, undefined]

/**
 * Makes the absolute addresses of calls and jumps, which are packed better, relative again, in place. What is taken for
 * an instruction has to be just what the encoder took for one (5.3.2, "Branch/Call/Jump Filters for Executables").
 *
 * @param start - the address of the first byte
 */
export function undoX86Filter(bytes: Uint8Array, start: number): void {
  const view = viewOf(bytes)
  // Opcodes in the three bytes before this one that were not converted, as bits.
  let recent = 0
  let lastOpcode = -1
  for (let at = 0; at + 4 < bytes.length; at++) {
    if ((bytes[at]! & 0xfe) !== CALL_OR_JUMP) continue
    const gap = at - lastOpcode
    lastOpcode = at
    recent = gap > 3 ? 0 : (recent << (gap - 1)) & 7
    const overlap = OVERLAPS[recent]
    const isAddress =
      overlap !== undefined && isNear(bytes[at + 4]!) && (overlap === 0 || !isNear(bytes[at + 4 - overlap]!))
    if (!isAddress) {
      recent = (recent << 1) | 1
      continue
    }
    const next = start + at + 5
    let relative = (view.getUint32(at + 1, true) - next) >>> 0
    if (overlap > 0 && isNear((relative >>> (24 - overlap * 8)) & 0xff)) {
      // The encoder avoided this address, which itself would have looked converted, by turning bits over.
      relative = ((relative ^ (2 ** (32 - overlap * 8) - 1)) - next) >>> 0
    }
    // 25 bits, sign-extended.
    view.setInt32(at + 1, (relative << 7) >> 7, true)
    recent = 0
    at += 4
  }
}
