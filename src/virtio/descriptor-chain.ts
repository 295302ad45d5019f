import type { GuestMemory } from '../memory/guest-memory.js'

/** A stretch of guest memory that one descriptor describes. */
export interface GuestBuffer {
  readonly address: number
  readonly length: number
}

/** One direction of a chain: its buffers in order, as if they were one. */
export class ScatterList {
  /** Bytes in all buffers. They may describe the same memory several times, so it may be more than there is RAM. */
  readonly length: number
  /** How many buffers there are. */
  readonly segments: number
  readonly #memory: GuestMemory
  readonly #buffers: readonly GuestBuffer[]

  /** @param buffers - all in RAM */
  constructor(memory: GuestMemory, buffers: readonly GuestBuffer[]) {
    this.#memory = memory
    this.#buffers = buffers
    this.segments = buffers.length
    this.length = buffers.reduce((sum, { length }) => sum + length, 0)
  }

  /**
   * The guest's own bytes, in place, in as many pieces as they lie in.
   *
   * @param offset - bytes from the start
   * @param length - bytes; less is given where there is less
   */
  views(offset = 0, length = this.length - offset): Uint8Array[] {
    const views: Uint8Array[] = []
    let skip = offset
    let left = length
    for (const buffer of this.#buffers) {
      if (left <= 0) break
      if (skip >= buffer.length) {
        skip -= buffer.length
        continue
      }
      const size = Math.min(buffer.length - skip, left)
      views.push(...this.#memory.pieces(buffer.address + skip, size))
      skip = 0
      left -= size
    }
    return views
  }

  /** Copies bytes from `offset` on into `target`. @returns how many there were */
  copyTo(target: Uint8Array, offset = 0): number {
    let done = 0
    for (const view of this.views(offset, target.length)) {
      target.set(view, done)
      done += view.length
    }
    return done
  }

  /** Copies `source` to `offset`. @returns how many bytes there was room for */
  copyFrom(source: Uint8Array, offset = 0): number {
    let done = 0
    for (const view of this.views(offset, source.length)) {
      view.set(source.subarray(done, done + view.length))
      done += view.length
    }
    return done
  }
}

/**
 * A chain of descriptors: a request of the driver's (VIRTIO 1.2, 2.7.5).
 *
 * What is to be decided by is copied once, with {@link read}: the guest may change its memory at any time.
 */
export class DescriptorChain {
  /** Index of the first descriptor: how the chain is called in the rings. */
  readonly head: number
  /** What the driver wrote for the device. */
  readonly readable: ScatterList
  /** What the device writes for the driver. */
  readonly writable: ScatterList

  constructor(
    memory: GuestMemory,
    head: number,
    readable: readonly GuestBuffer[],
    writable: readonly GuestBuffer[],
  ) {
    this.head = head
    this.readable = new ScatterList(memory, readable)
    this.writable = new ScatterList(memory, writable)
  }

  /**
   * A copy of what the driver wrote.
   *
   * @param limit - bytes that are of use: a hostile driver may describe any number
   * @param offset - bytes from the start
   */
  read(limit: number, offset = 0): Uint8Array {
    const bytes = new Uint8Array(Math.max(0, Math.min(limit, this.readable.length - offset)))
    this.readable.copyTo(bytes, offset)
    return bytes
  }

  /** Writes for the driver. @returns how many bytes there was room for: what `handle` returns, at offset 0 */
  write(bytes: Uint8Array, offset = 0): number {
    return this.writable.copyFrom(bytes, offset)
  }
}
