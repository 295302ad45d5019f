import { Readable, Writable } from 'node:stream'
import { NodevisorError } from '../errors.js'

/** Bytes of a stream that the agent may send before they are read. */
export const OUTPUT_WINDOW = 256 * 1024

/** Bytes that are kept together. */
const BLOCK_SIZE = 32 * 1024

const FIRST_SIZE = 4096

/** Output of a program in the guest. What is not read holds the program back. */
export class AgentOutput extends Readable {
  readonly #consumed: () => void
  /** Filled one after the other, so that many small frames do not cost more than a large one. */
  readonly #blocks: Buffer[] = []
  /** Bytes in the last block. */
  #filled = 0
  /** Bytes that the agent may send. */
  #credit = OUTPUT_WINDOW
  /** Bytes that were read and for which the agent got no new credit. */
  #unpaid = 0
  #wanted = false
  #finished = false

  /** @param consumed - called when there may be new credit to give */
  constructor(consumed: () => void) {
    // Nothing in the stream's own buffer, which would have a Buffer for each byte that comes alone.
    super({ highWaterMark: 1 })
    this.#consumed = consumed
  }

  /** Takes a copy of bytes from the agent. @returns false if they are more than it may send */
  accept(bytes: Buffer): boolean {
    if (bytes.length > this.#credit) return false
    this.#credit -= bytes.length
    if (this.destroyed) {
      this.#consume(bytes.length)
      return true
    }
    for (let rest = bytes; rest.length > 0; ) {
      if (this.#blocks.length === 0 || this.#filled === BLOCK_SIZE) {
        this.#blocks.push(Buffer.allocUnsafeSlow(BLOCK_SIZE))
        this.#filled = 0
      }
      const part = rest.subarray(0, BLOCK_SIZE - this.#filled)
      this.#blocks.at(-1)!.set(part, this.#filled)
      this.#filled += part.length
      rest = rest.subarray(part.length)
    }
    return true
  }

  /** Gives readers what has come. */
  deliver(): void {
    while (this.#wanted && this.#blocks.length > 0) {
      const block = this.#blocks.shift()!
      const length = this.#blocks.length === 0 ? this.#filled : BLOCK_SIZE
      // Before push(), which may come back here.
      this.#wanted = false
      this.#consume(length)
      this.push(block.subarray(0, length))
    }
    if (this.#finished && this.#blocks.length === 0) this.push(null)
  }

  /** Nothing more comes. */
  finish(): void {
    if (this.#finished) return
    this.#finished = true
    this.deliver()
  }

  /** Bytes of new credit for the agent, if it is worth a frame. They then count as given. */
  takeCredit(): number {
    if (this.#unpaid < OUTPUT_WINDOW / 4) return 0
    const credit = this.#unpaid
    this.#unpaid = 0
    this.#credit += credit
    return credit
  }

  override _read(): void {
    this.#wanted = true
    this.deliver()
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    const unread = this.#blocks.length === 0 ? 0 : (this.#blocks.length - 1) * BLOCK_SIZE + this.#filled
    this.#blocks.length = 0
    this.#consume(unread)
    done(error)
  }

  #consume(length: number): void {
    this.#unpaid += length
    this.#consumed()
  }
}

/** Input of a program in the guest. */
export class AgentInput extends Writable {
  readonly #offered: () => void
  #bytes: Buffer | undefined
  #done: ((error?: Error | null) => void) | undefined
  #ending = false
  #endSent = false

  /** @param offered - called when there is something to send */
  constructor(offered: () => void) {
    super({ highWaterMark: BLOCK_SIZE })
    this.#offered = offered
  }

  /** The next bytes to send, up to `most`; none for the end of input; undefined if there is nothing now. */
  take(most: number): Buffer | undefined {
    if (this.#bytes !== undefined) {
      if (most === 0) return undefined
      const part = this.#bytes.subarray(0, Math.min(most, BLOCK_SIZE))
      this.#bytes = part.length === this.#bytes.length ? undefined : this.#bytes.subarray(part.length)
      if (this.#bytes === undefined) this.#settle()
      return part
    }
    if (!this.#ending || this.#endSent) return undefined
    this.#endSent = true
    this.#settle()
    return Buffer.alloc(0)
  }

  override _write(bytes: Buffer, _encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    if (bytes.length > 0) this.#bytes = bytes
    this.#done = done
    if (bytes.length > 0) this.#offered()
    else this.#settle()
  }

  override _final(done: (error?: Error | null) => void): void {
    this.#ending = true
    this.#done = done
    this.#offered()
  }

  /** As with a pipe, that is the end of input. */
  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#bytes = undefined
    this.#ending = true
    this.#settle(new NodevisorError('ERR_CLOSED', 'Expected input to go to a program but it was closed'))
    this.#offered()
    done(error)
  }

  #settle(error?: Error): void {
    if (this.#done !== undefined) process.nextTick(this.#done, error)
    this.#done = undefined
  }
}

/** Collects bytes up to a limit. */
export class Collector {
  readonly #limit: number
  #bytes = Buffer.alloc(0)
  #length = 0
  /** There were more than the limit. */
  truncated = false

  constructor(limit: number) {
    this.#limit = limit
  }

  add(chunk: Buffer): void {
    const part = chunk.subarray(0, this.#limit - this.#length)
    if (part.length < chunk.length) this.truncated = true
    const needed = this.#length + part.length
    if (needed > this.#bytes.length) {
      const grown = Buffer.alloc(Math.min(this.#limit, Math.max(FIRST_SIZE, needed, 2 * this.#bytes.length)))
      grown.set(this.#bytes.subarray(0, this.#length))
      this.#bytes = grown
    }
    this.#bytes.set(part, this.#length)
    this.#length = needed
  }

  get bytes(): Buffer {
    return this.#bytes.subarray(0, this.#length)
  }
}
