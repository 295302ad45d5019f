import { GuestMemory } from '../../src/memory/guest-memory.js'
import type { Random } from './random.js'

/** Bytes of each stretch of RAM: little, for all of it is compared after every operation. */
export const REGION_SIZE = 0x4000
const HIGH_START = 2 ** 32
/** Two stretches that touch, a hole, and one above 4 GiB. */
const STARTS = [0, REGION_SIZE, HIGH_START] as const
const LOW_END = 2 * REGION_SIZE

/** Where the rings lie, below {@link DATA_START}; tables of indirect descriptors are between. */
export const RINGS_START = 0
export const TABLES_START = 0x2000
export const TABLES_END = 0x3000
export const DATA_START = 0x3000

/** A guest-physical address as a descriptor has it. */
export interface Address {
  readonly low: number
  readonly high: number
}

/** RAM, and what has to be in it. */
export class FuzzMemory {
  readonly memory: GuestMemory
  /** What RAM has to be: the stretches one behind the other. */
  readonly expected = new DataView(new ArrayBuffer(STARTS.length * REGION_SIZE))
  readonly expectedBytes = new Uint8Array(this.expected.buffer)
  readonly #actual: readonly Uint8Array[]
  readonly #expectedParts: readonly Uint8Array[]

  constructor() {
    const buffers = STARTS.map(() => new ArrayBuffer(REGION_SIZE))
    this.memory = new GuestMemory(STARTS.map((start, i) => ({ start, buffer: buffers[i]! })))
    this.#actual = buffers.map((buffer) => new Uint8Array(buffer))
    this.#expectedParts = STARTS.map((_, i) =>
      this.expectedBytes.subarray(i * REGION_SIZE, (i + 1) * REGION_SIZE),
    )
  }

  /** All zeros. */
  clear(): void {
    for (const bytes of this.#actual) bytes.fill(0)
    this.expectedBytes.fill(0)
  }

  /** Where an address is in {@link expected}; -1 where `length` bytes, at least 1, are not all RAM. */
  static indexOf({ low, high }: Address, length: number): number {
    if (high === 0 && low + length <= LOW_END) return low
    return high === 1 && low + length <= REGION_SIZE ? LOW_END + low : -1
  }

  /** The driver writes. @param index - in {@link expected} */
  write(index: number, bytes: Uint8Array): void {
    this.expectedBytes.set(bytes, index)
    this.copyToActual(index, bytes.length)
  }

  write16(index: number, value: number): void {
    this.expected.setUint16(index, value, true)
    this.copyToActual(index, 2)
  }

  /** A descriptor (VIRTIO 1.2, 2.7.5). */
  writeDescriptor(index: number, address: Address, length: number, flags: number, next: number): void {
    const { expected } = this
    expected.setUint32(index, address.low, true)
    expected.setUint32(index + 4, address.high, true)
    expected.setUint32(index + 8, length, true)
    expected.setUint16(index + 12, flags, true)
    expected.setUint16(index + 14, next, true)
    this.copyToActual(index, 16)
  }

  copyToActual(index: number, length: number): void {
    for (let done = 0; done < length; ) {
      const region = Math.floor((index + done) / REGION_SIZE)
      const at = (index + done) % REGION_SIZE
      const size = Math.min(length - done, REGION_SIZE - at)
      this.#actual[region]!.set(this.expectedBytes.subarray(index + done, index + done + size), at)
      done += size
    }
  }

  /** Takes what is in RAM as right. */
  accept(index: number, length: number): void {
    for (let done = 0; done < length; ) {
      const region = Math.floor((index + done) / REGION_SIZE)
      const at = (index + done) % REGION_SIZE
      const size = Math.min(length - done, REGION_SIZE - at)
      this.expectedBytes.set(this.#actual[region]!.subarray(at, at + size), index + done)
      done += size
    }
  }

  /** Where the bytes of a view of guest memory are in {@link expected}. */
  indexOfView(view: Uint8Array): number {
    const region = this.#actual.findIndex(({ buffer }) => buffer === view.buffer)
    if (region < 0) throw new Error('Expected a view of guest memory')
    return region * REGION_SIZE + view.byteOffset
  }

  /** @throws where RAM is not what it has to be */
  check(): void {
    for (const [region, actual] of this.#actual.entries()) {
      const expected = this.#expectedParts[region]!
      if (Buffer.compare(actual, expected) === 0) continue
      const at = actual.findIndex((byte, i) => byte !== expected[i])
      throw new Error(
        `Expected ${expected[at]} at 0x${(STARTS[region]! + at).toString(16)} but found ${actual[at]}`,
      )
    }
  }

  /** Memory for a buffer: most of it plain, some at the edges, now and then none at all. */
  static address(random: Random, length: number): Address {
    const sort = random.below(400)
    if (sort < 300) return { low: DATA_START + random.below(REGION_SIZE - length), high: 0 }
    if (sort < 340) return { low: random.below(REGION_SIZE - length + 1), high: 1 }
    const before = random.below(length + 1)
    // Across the border of two stretches, at pages' ends, and at the last byte.
    if (sort < 370) return { low: random.pick([REGION_SIZE, 0x5000, 0x6000]) - before, high: 0 }
    if (sort < 380) return { low: LOW_END - length, high: 0 }
    if (sort < 388) return { low: REGION_SIZE - length, high: 1 }
    // The rings and tables themselves.
    if (sort < 399) return { low: RINGS_START + random.below(DATA_START - length), high: 0 }
    return FuzzMemory.wrongAddress(random, before)
  }

  /** Addresses that are not RAM, if `before` is little: ends, the hole, and where arithmetic goes wrong. */
  static wrongAddress(random: Random, before: number): Address {
    const [low, high] = random.pick([
      [LOW_END, 0],
      [0x8000_0000, 0],
      [0, 1],
      [REGION_SIZE, 1],
      [0, 2],
      [0, 0x20_0000],
      [0, 0x8000_0000],
      [0, 0],
    ] as const)
    if (before === 0) return { low, high }
    if (low >= before) return { low: low - before, high }
    return { low: low - before + 2 ** 32, high: (high - 1) >>> 0 }
  }
}
