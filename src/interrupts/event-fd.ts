import { binding, type NativeEventFd } from '../binding.js'

/** An eventfd: the kernel's counter behind a doorbell (ioeventfd) or an interrupt (irqfd). */
export class EventFd {
  readonly #native: NativeEventFd

  constructor() {
    this.#native = new (binding().EventFd)()
  }

  /** The file descriptor, for KVM. */
  get fd(): number {
    return this.#native.fd()
  }

  /** Adds 1. */
  signal(): void {
    this.#native.signal()
  }

  /** Takes the count: how often it was signalled since the last time. */
  read(): number {
    return this.#native.read()
  }

  /** Calls `callback` from the event loop with the count, whenever there is one. Returns how to stop that. */
  onSignal(callback: (count: number) => void): () => void {
    this.#native.listen(() => {
      const count = this.#native.read()
      if (count > 0) callback(count)
    })
    return () => this.#native.unlisten()
  }

  close(): void {
    this.#native.close()
  }
}
