/** Bytes of output kept, a power of two: what a guest prints beyond that pushes out the oldest. */
export const OUTPUT_KEPT = 1024 * 1024

const FIRST_SIZE = 1024

/**
 * The last {@link OUTPUT_KEPT} bytes that a guest printed, each at the position it had in all its output. A
 * ring that grows as it is needed.
 */
export class OutputLog {
  #ring = new Uint8Array(0)
  #end = 0

  /** Position of the oldest byte kept. */
  get start(): number {
    return Math.max(0, this.#end - OUTPUT_KEPT)
  }

  /** Position after the newest byte: all bytes ever printed. */
  get end(): number {
    return this.#end
  }

  append(byte: number): void {
    if (this.#end === this.#ring.length && this.#end < OUTPUT_KEPT) this.#grow()
    this.#ring[this.#end & (this.#ring.length - 1)] = byte
    this.#end++
  }

  /** As {@link append}, for many bytes. They are copied. */
  appendAll(bytes: Uint8Array): void {
    const kept = bytes.subarray(Math.max(0, bytes.length - OUTPUT_KEPT))
    while (this.#ring.length < Math.min(this.#end + bytes.length, OUTPUT_KEPT)) this.#grow()
    this.#end += bytes.length - kept.length
    const at = this.#end & (this.#ring.length - 1)
    const part = kept.subarray(0, this.#ring.length - at)
    this.#ring.set(part, at)
    this.#ring.set(kept.subarray(part.length))
    this.#end += kept.length
  }

  /** A copy of the bytes from `from` up to `to`; those no longer kept are left out. */
  bytes(from: number, to = this.#end): Buffer {
    const first = Math.max(from, this.start)
    const length = Math.max(0, to - first)
    const copy = Buffer.allocUnsafe(length)
    const at = first & (this.#ring.length - 1)
    const part = this.#ring.subarray(at, at + length)
    copy.set(part)
    if (part.length < length) copy.set(this.#ring.subarray(0, length - part.length), part.length)
    return copy
  }

  /** The same as text, without a character at the end of the log that has not arrived in full. */
  text(from: number, to = this.#end): string {
    return decode(this.bytes(from, to), to < this.#end)
  }

  #grow(): void {
    const ring = new Uint8Array(Math.max(FIRST_SIZE, this.#ring.length * 2))
    ring.set(this.#ring)
    this.#ring = ring
  }
}

/**
 * UTF-8 as text, with U+FFFD for what is malformed.
 *
 * @param complete - whether an unfinished character at the end is malformed too; if not, it is left out
 */
export function decode(bytes: Uint8Array, complete = false): string {
  return new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes, { stream: !complete })
}

/**
 * How many of the bytes the first `units` UTF-16 units of their text stand for: what {@link decode} makes of
 * them, counted back.
 */
export function bytesOfText(bytes: Uint8Array, units: number): number {
  let at = 0
  for (let seen = 0; seen < units && at < bytes.length; ) {
    const length = sequenceLength(bytes, at)
    // Only a whole sequence of four makes a surrogate pair; a malformed one is shorter and one U+FFFD.
    seen += length === 4 ? 2 : 1
    at += length
  }
  return at
}

/** Bytes of the UTF-8 sequence at `at`, or of the malformed part that one U+FFFD replaces (WHATWG Encoding, 8.1). */
function sequenceLength(bytes: Uint8Array, at: number): number {
  const lead = bytes[at]!
  const length = lead < 0xc2 || lead > 0xf4 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4
  // Of overlong forms, surrogates and what lies beyond U+10FFFF the second byte is already wrong.
  let lower = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80
  let upper = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf
  for (let i = 1; i < length; i++) {
    const byte = bytes[at + i]
    if (byte === undefined || byte < lower || byte > upper) return i
    lower = 0x80
    upper = 0xbf
  }
  return length
}
