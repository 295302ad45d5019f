// LZ4, "Legacy frame": https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md#legacy-frame
// Blocks: https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md

import { viewOf } from './image-reading.js'

/** The first four bytes of a legacy frame, as a little-endian number. */
export const LZ4_LEGACY_MAGIC = 0x184c_2102

/** What a block unpacks to at most. */
const BLOCK_SIZE = 8 * 2 ** 20
/** A match is this long at least: its length is counted from here. */
const MIN_MATCH = 4
/** A length of 4 bits that goes on in the bytes after it … */
const LENGTH_CONTINUES = 15
/** … and a byte of it after which there is another. */
const BYTE_CONTINUES = 255

/**
 * Unpacks LZ4 in the legacy frame format.
 *
 * @param size - bytes that it unpacks to
 * @throws `Error`, saying why, for input that is damaged or unpacks to another size
 */
export function unpackLz4Legacy(input: Uint8Array, size: number): Uint8Array {
  const output = new Uint8Array(size)
  const view = viewOf(input)
  let written = 0
  for (let at = 0; at < input.length; ) {
    if (at + 4 > input.length) throw new Error(`it ends in the size of a block, at ${at}`)
    const word = view.getUint32(at, true)
    at += 4
    // A frame ends where the next one begins.
    if (word === LZ4_LEGACY_MAGIC) continue
    if (word > input.length - at) throw new Error(`it ends in a block of ${word} bytes, at ${at}`)
    const end = Math.min(written + BLOCK_SIZE, size)
    written = unpackBlock(input.subarray(at, at + word), output.subarray(0, end), written)
    at += word
  }
  if (written !== size) throw new Error(`it unpacks to ${written} bytes, not ${size}`)
  return output
}

/** Unpacks one block to `output` from `start` on. @returns where what it unpacked to ends */
function unpackBlock(input: Uint8Array, output: Uint8Array, start: number): number {
  let from = 0
  let to = start
  const readLength = (nibble: number) => {
    let length = nibble
    if (nibble === LENGTH_CONTINUES) {
      let byte: number
      do {
        byte = nextByte()
        length += byte
      } while (byte === BYTE_CONTINUES)
    }
    return length
  }
  const nextByte = () => {
    if (from >= input.length) throw new Error('a block ends in the middle of a sequence')
    return input[from++]!
  }

  while (from < input.length) {
    const token = nextByte()
    const literals = readLength(token >> 4)
    if (literals > input.length - from) throw new Error('a block ends in the middle of its literals')
    if (literals > output.length - to) throw new Error('it unpacks to more than its size')
    // A view costs more than a few bytes do.
    if (literals > 16) output.set(input.subarray(from, from + literals), to)
    else for (let index = 0; index < literals; index++) output[to + index] = input[from + index]!
    from += literals
    to += literals
    // The last sequence has no match.
    if (from === input.length) break

    const distance = nextByte() | (nextByte() << 8)
    const length = readLength(token & 0xf) + MIN_MATCH
    if (distance === 0 || distance > to - start) throw new Error('a match begins before its block')
    if (length > output.length - to) throw new Error('it unpacks to more than its size')
    if (length > 32 && length <= distance) output.copyWithin(to, to - distance, to - distance + length)
    // What is copied may overlap with what it is copied to, and then repeats.
    else for (let index = to; index < to + length; index++) output[index] = output[index - distance]!
    to += length
  }
  return to
}
