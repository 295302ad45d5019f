/** Bytes of all the buffers together. */
export function totalLength(buffers: readonly Uint8Array[]): number {
  let length = 0
  for (const buffer of buffers) length += buffer.length
  return length
}

/** Takes a list of buffers apart from front to back, in place: the parts are views of the same bytes. */
export class BufferCursor {
  readonly #buffers: readonly Uint8Array[]
  #index = 0
  /** Bytes of the buffer at {@link #index} that were taken. */
  #taken = 0

  constructor(buffers: readonly Uint8Array[]) {
    this.#buffers = buffers
  }

  /** Leaves `length` bytes out. */
  skip(length: number): void {
    let left = length
    while (left > 0 && this.#index < this.#buffers.length) {
      const available = this.#buffers[this.#index]!.length - this.#taken
      if (left < available) {
        this.#taken += left
        return
      }
      left -= available
      this.#index += 1
      this.#taken = 0
    }
  }

  /** The next `length` bytes, or fewer where they would need more than `maxBuffers` views or there are no more. */
  take(length: number, maxBuffers = Number.POSITIVE_INFINITY): Uint8Array[] {
    const parts: Uint8Array[] = []
    let missing = length
    while (missing > 0 && parts.length < maxBuffers && this.#index < this.#buffers.length) {
      const buffer = this.#buffers[this.#index]!
      const part = buffer.subarray(this.#taken, this.#taken + missing)
      if (part.length > 0) parts.push(part)
      missing -= part.length
      this.#taken += part.length
      if (this.#taken < buffer.length) break
      this.#index += 1
      this.#taken = 0
    }
    return parts
  }
}
