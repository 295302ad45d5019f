import { Readable } from 'node:stream'
import type { DebugConsoleBackend } from '../devices/debug-console.js'
import { GuestOutput } from './guest-output.js'
import type { OutputMatch, WaitOptions } from './output-waiters.js'

/**
 * What a guest writes to the debug console, as a stream. Output that nobody reads, or not fast enough, is kept
 * up to 1 MiB; then the oldest goes, counted in {@link DebugOutput.droppedBytes}.
 */
export class DebugOutput extends Readable implements DebugConsoleBackend {
  readonly #output = new GuestOutput(this, 'the debug console')

  /** The last MiB, as text (UTF-8). */
  get output(): string {
    return this.#output.text
  }

  /** Bytes that were pushed out before anybody read them from the stream. */
  get droppedBytes(): number {
    return this.#output.droppedBytes
  }

  /** As `SerialPort.waitFor`. */
  waitFor(pattern: string | RegExp, options?: WaitOptions): Promise<OutputMatch> {
    return this.#output.waitFor(pattern, options)
  }

  /** A byte from the guest. @internal */
  transmit(byte: number): void {
    this.#output.append(byte)
  }

  /** As `SerialPort.endOfRun`. @internal */
  endOfRun(why: string): void {
    this.#output.endOfRun(why)
  }

  /** As `SerialPort.close`. @internal */
  close(why: string): void {
    this.#output.close(why)
  }

  override _read(): void {
    this.#output.wanted()
  }
}
