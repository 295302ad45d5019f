import type { AccessSize, Device, DeviceState } from '../../src/index.js'

/** The guest's device of guests/continuity: what it reads depends on every access before it. */
export class EchoHashDevice implements Device {
  readonly name = 'echo-hash'
  readonly ports = { base: 0x500, length: 8 }
  readonly mmio = { base: 0xd000_0000, length: 8 }
  /** Reads and writes so far. */
  accesses = 0
  #hash = 1

  read(offset: number, size: AccessSize, region: number): number {
    this.#take(offset, size, region)
    return this.#hash
  }

  write(offset: number, value: number, size: AccessSize, region: number): void {
    this.#take(offset, size, region)
    this.#mix(value)
  }

  saveState(): DeviceState {
    return { accesses: this.accesses, hash: this.#hash }
  }

  restoreState(state: DeviceState): void {
    const { accesses, hash } = state as { readonly accesses: number; readonly hash: number }
    this.accesses = accesses
    this.#hash = hash
  }

  #take(offset: number, size: AccessSize, region: number): void {
    this.accesses++
    this.#mix((region << 8) | (offset << 4) | size)
  }

  /** Every step can be undone, so that what was different never becomes the same. */
  #mix(value: number): void {
    const hash = Math.imul(this.#hash ^ value, 0x01000193)
    this.#hash = (hash ^ (hash >>> 15)) >>> 0
  }
}
