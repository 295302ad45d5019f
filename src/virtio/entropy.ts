import { randomFillSync } from 'node:crypto'
import type { DeviceState } from '../bus/device.js'
import { invalidArgument } from '../errors.js'
import type { Clock, Timer } from '../interrupts/timer.js'
import type { DescriptorChain } from './descriptor-chain.js'
import type { VirtioDevice, VirtioDriver, VirtioQueueOptions } from './virtio-device.js'

const DEVICE_TYPE = 4
const QUEUE_SIZE = 64
/** Bytes that one request gets at most; the driver asks again for more (VIRTIO 1.2, 5.4.6). */
const MAX_REQUEST = 64 * 1024
const DEFAULT_RATE = 2 ** 20
const NS_PER_SECOND = 1e9
/** What may be taken at once after a pause, in seconds of the rate. */
const BURST = 0.1

/** How a guest gets random numbers. */
export interface VirtioEntropyOptions {
  /** Fills bytes, which are the guest's own memory: the host's cryptographic generator unless given. */
  readonly source?: (bytes: Uint8Array) => void
  /** How much a guest may take: 1 MiB a second unless given. */
  readonly bytesPerSecond?: number
}

interface Waiting {
  readonly chain: DescriptorChain
  readonly done: (written: number) => void
  readonly failed: (error: unknown) => void
}

/** A source of random numbers: virtio-rng, the entropy device (VIRTIO 1.2, 5.4). */
export class VirtioEntropy implements VirtioDevice {
  readonly name = 'rng'
  readonly deviceType = DEVICE_TYPE
  readonly queues: readonly VirtioQueueOptions[] = [
    { maxSize: QUEUE_SIZE, handle: (chain) => this.#handle(chain) },
  ]
  readonly #source: (bytes: Uint8Array) => void
  readonly #rate: number
  #clock: Clock | undefined
  #timer: Timer | undefined
  /** Bytes that may be given at {@link #time}. */
  #allowance = 0
  #time = 0
  /** Requests beyond the allowance: no more than the queue has descriptors. */
  #waiting: Waiting[] = []

  /** @throws `ERR_INVALID_ARGUMENT` */
  constructor({ source = randomFillSync, bytesPerSecond = DEFAULT_RATE }: VirtioEntropyOptions = {}) {
    if (typeof source !== 'function') throw invalidArgument('source of rng', 'a function', source)
    if (!Number.isFinite(bytesPerSecond) || bytesPerSecond < 1) {
      throw invalidArgument('bytesPerSecond of rng', 'a number of at least 1', bytesPerSecond)
    }
    this.#source = source
    this.#rate = bytesPerSecond
  }

  start({ clock }: VirtioDriver): void {
    // A reset fills nothing up: a guest could do it again and again.
    if (this.#clock !== undefined) return
    this.#clock = clock
    this.#timer = clock.timer(() => this.#serveWaiting())
    this.#allowance = this.#burst
    this.#time = clock.now()
  }

  reset(): void {
    this.#timer?.disarm()
    for (const { done } of this.#waiting.splice(0)) done(0)
  }

  /** What is left of the allowance is not worth keeping. */
  saveState(): DeviceState {
    return null
  }

  restoreState(): void {}

  get #burst(): number {
    return Math.max(1, this.#rate * BURST)
  }

  #handle(chain: DescriptorChain): number | Promise<number> {
    if (this.#waiting.length === 0) {
      this.#refill()
      if (this.#allowance >= 1) return this.#fill(chain)
    }
    return new Promise((done, failed) => {
      // Armed for the first one: those that come later must not put it off.
      if (this.#waiting.push({ chain, done, failed }) === 1) this.#arm()
    })
  }

  #serveWaiting(): void {
    this.#refill()
    while (this.#waiting.length > 0 && this.#allowance >= 1) {
      const { chain, done, failed } = this.#waiting.shift()!
      try {
        done(this.#fill(chain))
      } catch (error) {
        failed(error)
      }
    }
    if (this.#waiting.length > 0) this.#arm()
  }

  #fill({ writable }: DescriptorChain): number {
    const length = Math.min(writable.length, MAX_REQUEST, Math.floor(this.#allowance))
    for (const view of writable.views(0, length)) this.#source(view)
    // Requests without room cost the host something, too.
    this.#allowance -= Math.max(length, 1)
    return length
  }

  #refill(): void {
    const now = this.#clock!.now()
    const earned = ((now - this.#time) / NS_PER_SECOND) * this.#rate
    this.#allowance = Math.min(this.#burst, this.#allowance + earned)
    this.#time = now
  }

  /** To when there is something worth giving. */
  #arm(): void {
    const wanted = Math.min(this.#waiting[0]!.chain.writable.length, this.#burst / 2)
    this.#timer!.arm((Math.max(1, wanted) / this.#rate) * NS_PER_SECOND)
  }
}
