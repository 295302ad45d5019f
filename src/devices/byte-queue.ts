/** A queue of bytes that never holds more than its capacity. */
export class ByteQueue {
  readonly capacity: number
  readonly #bytes: Uint8Array
  #first = 0
  #length = 0

  constructor(capacity: number) {
    this.capacity = capacity
    this.#bytes = new Uint8Array(capacity)
  }

  get length(): number {
    return this.#length
  }

  /** Adds a byte at the end; false, and nothing done, when the queue is full. */
  push(byte: number): boolean {
    if (this.#length === this.capacity) return false
    this.#bytes[(this.#first + this.#length) % this.capacity] = byte
    this.#length++
    return true
  }

  /** Takes the first byte; 0 when there is none. */
  shift(): number {
    if (this.#length === 0) return 0
    const byte = this.#bytes[this.#first]!
    this.#first = (this.#first + 1) % this.capacity
    this.#length--
    return byte
  }

  clear(): void {
    this.#first = 0
    this.#length = 0
  }

  /** A copy of what is queued, first byte first. */
  toBytes(): Uint8Array {
    return Uint8Array.from({ length: this.#length }, (_, index) => {
      return this.#bytes[(this.#first + index) % this.capacity]!
    })
  }

  /** Replaces what is queued; bytes beyond the capacity are left out. */
  load(bytes: Uint8Array): void {
    this.clear()
    for (const byte of bytes) this.push(byte)
  }
}
