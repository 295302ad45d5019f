import {
  type ConsoleBackend,
  type ConsoleGuest,
  type ConsoleSize,
  checkConsoleSize,
} from '../virtio/console.js'
import { GuestPort } from './guest-port.js'

/** A guest sends whole pages at a time, and each chunk of a stream costs a file or socket a way through a thread. */
const WINDOW = 512 * 1024

/**
 * A port of a machine's virtio console, as a stream: see {@link GuestPort}. Input waits until the guest has
 * opened the port.
 *
 * It emits `guestOpen` when the guest opens its end of the port and `guestClose` when it closes it, as a
 * program in the guest does that opens `/dev/virtio-ports/NAME`; drivers of consoles open theirs as they
 * start. To the guest, the host's end is open until the stream is destroyed.
 */
export class ConsolePort extends GuestPort<ConsoleGuest> implements ConsoleBackend {
  /** What the guest calls it; undefined for one that has no name. */
  readonly name: string | undefined
  #size: ConsoleSize | undefined
  #guestOpen = false
  /** What the last event said. */
  #announcedOpen = false
  #announcing = false

  constructor(name?: string) {
    super(name === undefined ? 'the console' : `the console port '${name}'`, WINDOW)
    this.name = name
  }

  /** Whether the guest has opened its end of the port. */
  get guestOpen(): boolean {
    return this.#guestOpen
  }

  /**
   * Tells the guest how large the terminal is at this end, if the port is a console. A `resize` listener of
   * `process.stdout` is the place for it.
   *
   * @throws `ERR_INVALID_ARGUMENT`
   */
  resize(size: ConsoleSize): void {
    this.#size = checkConsoleSize(size)
    this.guest?.resize(this.#size)
  }

  override connect(guest: ConsoleGuest): void {
    super.connect(guest)
    if (this.#size !== undefined) guest.resize(this.#size)
  }

  /** Whether the host's end is open. @internal */
  get open(): boolean {
    return !this.destroyed
  }

  /** Bytes from the guest, in its own memory. @internal */
  transmit(bytes: Uint8Array): void {
    this.log.appendAll(bytes)
  }

  /** The guest has opened or closed its end. @internal */
  setGuestOpen(open: boolean): void {
    if (open === this.#guestOpen) return
    this.#guestOpen = open
    if (this.#announcing) return
    this.#announcing = true
    // Not inside an exit; and a guest that opens and closes without end makes no more than two events of it.
    process.nextTick(() => {
      this.#announcing = false
      if (this.#guestOpen === this.#announcedOpen) this.#announce(!this.#guestOpen)
      this.#announce(this.#guestOpen)
    })
  }

  /** As {@link GuestPort.close}. @internal */
  override close(why: string): void {
    super.close(why)
    this.setGuestOpen(false)
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    super._destroy(error, done)
    this.guest?.openChanged()
  }

  #announce(open: boolean): void {
    this.#announcedOpen = open
    this.emit(open ? 'guestOpen' : 'guestClose')
  }
}
