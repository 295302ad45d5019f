import type { Readable } from 'node:stream'
import { OutputLog } from './output-log.js'
import { type OutputMatch, OutputWaiters, type WaitOptions } from './output-waiters.js'

/** Bytes in one chunk of the stream, at most, unless given. */
const CHUNK_SIZE = 64 * 1024

/**
 * What a guest prints: kept for those who look later, searched for those who wait, and fed into a stream.
 *
 * A byte costs a store. The first byte of a run-loop slice schedules one delivery for when the slice is over
 * (`process.nextTick`): output arrives in chunks, and the listeners of the stream run neither inside an exit
 * nor inside a device, so that their exceptions are not the machine's.
 *
 * Memory is bounded: the log is all there is. The stream is given no more than it asks for, and what the log
 * loses before the stream asked is counted.
 */
export class GuestOutput {
  readonly #stream: Readable
  readonly #chunkSize: number
  readonly #log = new OutputLog()
  readonly #waiters: OutputWaiters
  /** Position up to which the stream was given the log. */
  #delivered = 0
  #dropped = 0
  /** The stream asked for more. */
  #wanted = false
  #scheduled = false
  #closed = false
  #ended = false
  /** When the first byte came, by `performance.now()`. */
  firstByteTime: number | undefined

  /**
   * @param stream - calls {@link GuestOutput.wanted} in its `_read`
   * @param place - where the output is, for errors
   * @param chunkSize - bytes in one chunk of the stream, at most: 64 KiB unless given
   */
  constructor(stream: Readable, place: string, chunkSize = CHUNK_SIZE) {
    this.#stream = stream
    this.#chunkSize = chunkSize
    this.#waiters = new OutputWaiters(this.#log, place)
  }

  /** The last MiB of it, as text. */
  get text(): string {
    return this.#log.text(0)
  }

  /** Bytes the stream will never give: nobody read them while they were kept. */
  get droppedBytes(): number {
    return this.#dropped + Math.max(0, this.#log.start - this.#delivered)
  }

  /** Bytes the stream was not given yet. */
  get backlog(): number {
    return this.#log.end - Math.max(this.#delivered, this.#log.start)
  }

  append(byte: number): void {
    this.firstByteTime ??= performance.now()
    this.#log.append(byte)
    this.#schedule()
  }

  /** As {@link append}, for many bytes. They are copied. */
  appendAll(bytes: Uint8Array): void {
    if (bytes.length === 0) return
    this.firstByteTime ??= performance.now()
    this.#log.appendAll(bytes)
    this.#schedule()
  }

  /** The stream asks for more. */
  wanted(): void {
    this.#wanted = true
    this.#deliver()
  }

  waitFor(pattern: string | RegExp, options?: WaitOptions): Promise<OutputMatch> {
    const match = this.#waiters.waitFor(pattern, options)
    // A run may end before the caller comes to await this; that must not end the process (unhandledRejection).
    match.catch(() => {})
    return match
  }

  endOfRun(why: string): void {
    this.#waiters.endOfRun(why)
  }

  /** Nothing more comes: ends the stream, once it was given all there is. */
  close(why: string): void {
    this.#waiters.close(why)
    this.#closed = true
    this.#schedule()
  }

  #schedule(): void {
    if (this.#scheduled) return
    this.#scheduled = true
    process.nextTick(() => {
      this.#scheduled = false
      this.#waiters.search()
      this.#deliver()
    })
  }

  #deliver(): void {
    const log = this.#log
    if (this.#ended) return
    while (this.#wanted && this.#delivered < log.end && !this.#stream.destroyed) {
      this.#dropped = this.droppedBytes
      const from = Math.max(this.#delivered, log.start)
      // Before push, since that may run a listener which comes back here.
      this.#delivered = Math.min(log.end, from + this.#chunkSize)
      this.#wanted = this.#stream.push(log.bytes(from, this.#delivered))
    }
    if (this.#closed && this.#delivered === log.end) {
      this.#ended = true
      this.#stream.push(null)
    }
  }
}
