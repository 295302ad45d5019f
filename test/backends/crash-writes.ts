import { type BlockBackend, SECTOR_SIZE } from '../../src/virtio/block-backend.js'

/** Writes that are under way together: each in a part of the disk of its own, which begins within a cluster. */
export const WRITES_AT_ONCE = 8

/** A disk that stamped writes go to: every sector says which write it is from. */
export interface StampedDisk {
  readonly zoneSectors: number
  readonly seed: number
}

export const sectorsOf = ({ zoneSectors }: StampedDisk) => WRITES_AT_ONCE * zoneSectors

/** Where write `number` goes, 1 being the first. */
export function placeOf(disk: StampedDisk, number: number): { sector: number; count: number } {
  const random = mix(disk.seed, number)
  const count = Math.min(1 + (random % 24), disk.zoneSectors)
  const zone = number % WRITES_AT_ONCE
  return { sector: zone * disk.zoneSectors + (mix(random, 1) % (disk.zoneSectors - count + 1)), count }
}

/** A sector as write `number` leaves it; 0 is what is there before the first. */
export function stamp(number: number, sector: number): Uint8Array {
  const bytes = Buffer.alloc(SECTOR_SIZE, mix(number, sector) & 0xff)
  bytes.writeUInt32LE(number, 0)
  bytes.writeUInt32LE(sector, 4)
  bytes.writeUInt32LE(number, SECTOR_SIZE - 4)
  return bytes
}

/** The content before the first write. */
export function untouched(disk: StampedDisk): Uint8Array {
  return Buffer.concat(Array.from({ length: sectorsOf(disk) }, (_, sector) => stamp(0, sector)))
}

/** Does the writes from `first` on that are under way together. */
export async function writeStamps(backend: BlockBackend, disk: StampedDisk, first: number): Promise<void> {
  const writes = Array.from({ length: WRITES_AT_ONCE }, (_, i) => {
    const { sector, count } = placeOf(disk, first + i)
    const buffers = Array.from({ length: count }, (_, j) => stamp(first + i, sector + j))
    return backend.write(sector * SECTOR_SIZE, buffers)
  })
  await Promise.all(writes)
}

/** What a disk has to have: by sector, the last write that is durable. */
export class DurableWrites {
  readonly #disk: StampedDisk
  readonly #numbers: Uint32Array
  /** No write has a higher number. */
  last = 0

  constructor(disk: StampedDisk) {
    this.#disk = disk
    this.#numbers = new Uint32Array(sectorsOf(disk))
  }

  copy(): DurableWrites {
    const copy = new DurableWrites(this.#disk)
    copy.#numbers.set(this.#numbers)
    copy.last = this.last
    return copy
  }

  /** The writes up to this one were done when a flush began that has ended. */
  flushed(last: number): void {
    for (let number = this.last + 1; number <= last; number++) {
      const { sector, count } = placeOf(this.#disk, number)
      this.#numbers.fill(number, sector, sector + count)
    }
    this.last = last
  }

  /**
   * Looks at every sector of a disk: it has to be that of the last durable write, or of a later one. From then on
   * that counts as durable.
   *
   * @returns what is wrong
   */
  async check(backend: BlockBackend): Promise<string[]> {
    const bytes = Buffer.alloc(this.#numbers.length * SECTOR_SIZE)
    await backend.read(0, [bytes])
    const wrong: string[] = []
    for (const [sector, durable] of this.#numbers.entries()) {
      const found = bytes.subarray(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
      const number = found.readUInt32LE(0)
      const isWhole = found.equals(stamp(number, sector)) && (number === 0 || this.#covers(number, sector))
      if (!isWhole) wrong.push(`sector ${sector} is of no write`)
      else if (number < durable) wrong.push(`sector ${sector} is of write ${number}, not ${durable}`)
      this.#numbers[sector] = number
      this.last = Math.max(this.last, number)
    }
    return wrong
  }

  #covers(number: number, sector: number): boolean {
    const place = placeOf(this.#disk, number)
    return sector >= place.sector && sector < place.sector + place.count
  }
}

/** A random number that is the same for the same two numbers. */
export function mix(a: number, b: number): number {
  let hash = Math.imul(a ^ 0x9e3779b9, 0x85ebca6b) ^ Math.imul(b + 0x165667b1, 0xc2b2ae35)
  hash = Math.imul(hash ^ (hash >>> 15), 0x2c1b3c6d)
  hash = Math.imul(hash ^ (hash >>> 12), 0x297a2d39)
  return (hash ^ (hash >>> 15)) >>> 0
}
