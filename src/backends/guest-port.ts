import { Duplex } from 'node:stream'
import type { SerialGuest } from '../devices/serial.js'
import { NodevisorError } from '../errors.js'
import { GuestOutput } from './guest-output.js'
import type { OutputMatch, WaitOptions } from './output-waiters.js'

/** See the constructor. */
const WINDOW = 64 * 1024
const STREAM_BUFFER = 16 * 1024

type WriteDone = (error?: Error | null) => void

/**
 * The host's end of a line to the guest, as a stream: what the guest sends can be read, what is written the
 * guest receives.
 *
 * Output that nobody reads is kept up to 1 MiB; then the oldest goes, counted in
 * {@link GuestPort.droppedBytes}. As soon as somebody reads (a `data` or `readable` listener, a pipe, an
 * iterator) a guest that outruns the reader waits instead and nothing is lost. Input waits until the guest
 * takes it, with the back-pressure of a stream.
 *
 * {@link GuestPort.waitFor} and {@link GuestPort.output} do not depend on who reads.
 */
export abstract class GuestPort<Guest extends SerialGuest = SerialGuest> extends Duplex {
  /** The device; undefined before there is one, and after the machine has closed. @internal */
  protected guest: Guest | undefined
  /** @internal */
  protected readonly log: GuestOutput
  readonly #place: string
  readonly #window: number
  /** Input that the guest has not taken. */
  #input: { bytes: Uint8Array; readonly done: WriteDone } | undefined
  #hungUp = false

  /**
   * @param place - what it is, for errors: `the serial port`
   * @param window - unread bytes from which on a guest whose output is being read has to wait, and bytes in a chunk of the
   *   stream: 64 KiB unless given
   */
  constructor(place: string, window = WINDOW) {
    super({ readableHighWaterMark: STREAM_BUFFER, writableHighWaterMark: STREAM_BUFFER })
    this.#place = place
    this.#window = window
    this.log = new GuestOutput(this, place, window)
  }

  /** The last MiB that the guest sent, as text (UTF-8). */
  get output(): string {
    return this.log.text
  }

  /** Bytes of output that were pushed out before anybody read them from the stream. */
  get droppedBytes(): number {
    return this.log.droppedBytes
  }

  /** When the guest sent its first byte, by `performance.now()`; undefined before. */
  get firstOutputTime(): number | undefined {
    return this.log.firstByteTime
  }

  /**
   * Waits for text in what the guest sends, like `expect`. All output counts from the end of the previous
   * match on, also what came before this call, and whether or not anybody reads the stream. Waits that
   * overlap do not disturb each other: each counts from the last match before it began.
   *
   * A regular expression is tried whenever output arrives, on what is there by then: `.*` may match less than
   * a line. Its flags `g` and `y` have no meaning here, and `^` is also the end of the previous match. A
   * match that arrives in pieces may be up to 64 KiB long.
   *
   * @returns the match, and the output before it
   * @throws `ERR_TIMEOUT`, with the end of the output in the message
   * @throws `ERR_ABORTED`, with the signal's reason as `cause`
   * @throws `ERR_SERIAL_ENDED` when the run, or the machine, ended before it came
   * @throws `ERR_INVALID_ARGUMENT`
   */
  waitFor(pattern: string | RegExp, options?: WaitOptions): Promise<OutputMatch> {
    return this.log.waitFor(pattern, options)
  }

  /** The device connects itself. @internal */
  connect(guest: Guest): void {
    this.guest = guest
    this.#offerInput()
  }

  /** Whether the guest may send. @internal */
  get ready(): boolean {
    return this.log.backlog < this.#window || this.destroyed || !this.#hasReader
  }

  /** The guest has room for input again. @internal */
  receiveReady(): void {
    this.#offerInput()
  }

  /**
   * A run has ended, and another may follow: rejects all waits.
   *
   * @param why - a clause for the error: `the run ended with halt`
   * @internal
   */
  endOfRun(why: string): void {
    this.log.endOfRun(why)
  }

  /**
   * The machine will not run again: rejects all waits and ends the readable side behind what it still has to
   * give. Input goes nowhere from now on, without an error: when a guest ends is its own choice, and must not
   * make a program fail that happens to write. Later calls do nothing.
   *
   * @param why - as for {@link GuestPort.endOfRun}
   * @internal
   */
  close(why: string): void {
    if (this.#hungUp) return
    this.#hungUp = true
    this.guest = undefined
    this.log.close(why)
    this.#inputDone()
    // Only now, for a write after the end is an error; then both sides are done, and pipes let go.
    this.once('end', () => this.end())
  }

  /** As that of every emitter; a guest does not go on waiting for a reader that has gone. */
  override removeListener(...args: Parameters<Duplex['removeListener']>): this {
    super.removeListener(...args)
    this.guest?.transmitReady()
    return this
  }

  /** The same as {@link GuestPort.removeListener}. */
  override off(...args: Parameters<Duplex['off']>): this {
    return this.removeListener(...args)
  }

  override _read(): void {
    this.log.wanted()
    this.guest?.transmitReady()
  }

  override _write(bytes: Buffer, _encoding: BufferEncoding, done: WriteDone): void {
    this.#input = { bytes, done }
    if (this.#hungUp) this.#inputDone()
    else this.#offerInput()
  }

  override _destroy(error: Error | null, done: WriteDone): void {
    this.#inputDone(
      new NodevisorError(
        'ERR_CLOSED',
        `Expected ${this.#place} to be open but it was destroyed before the guest read; destroy it later`,
      ),
    )
    this.guest?.transmitReady()
    done(error)
  }

  get #hasReader(): boolean {
    return this.listenerCount('data') > 0 || this.listenerCount('readable') > 0
  }

  #offerInput(): void {
    if (this.#input === undefined || this.guest === undefined) return
    const taken = this.guest.receive(this.#input.bytes)
    this.#input.bytes = this.#input.bytes.subarray(taken)
    if (this.#input.bytes.length === 0) this.#inputDone()
  }

  /** Later, because this may be inside an exit, where a listener for `drain` has no business. */
  #inputDone(error?: Error): void {
    if (this.#input !== undefined) process.nextTick(this.#input.done, error)
    this.#input = undefined
  }
}
