import { invalidArgument } from '../errors.js'
import { isZero } from '../memory/is-zero.js'
import { type BlockBackend, isDiskSize, SECTOR_SIZE } from '../virtio/block-backend.js'
import { totalLength } from './buffer-list.js'
import { checkRange, type Request, Requests } from './requests.js'

/** Bytes that are allocated together. */
const CHUNK_SIZE = 65536

/** What is on a {@link MemoryDisk}: give one of them. */
export interface MemoryDiskOptions {
  /** Bytes of a disk full of zeros, a multiple of 512. */
  readonly size?: number
  /** The disk's content, copied: a multiple of 512 bytes. */
  readonly bytes?: Uint8Array
}

/**
 * A disk in the memory of this process, gone when it is closed. It takes as much as the guest has written: what is
 * zero takes nothing.
 */
export class MemoryDisk implements BlockBackend {
  readonly size: number
  readonly readOnly = false
  /** By their index; zero where there is none. The last one may reach beyond the disk. */
  readonly #chunks = new Map<number, Uint8Array>()
  readonly #requests = new Requests()

  /** @throws `ERR_INVALID_ARGUMENT` for a size that no disk has */
  constructor(options: MemoryDiskOptions) {
    const { size, bytes } = options
    if ((size === undefined) === (bytes === undefined)) {
      throw invalidArgument('options', 'either size or bytes', options)
    }
    if (bytes !== undefined && !(bytes instanceof Uint8Array))
      throw invalidArgument('bytes', 'a Uint8Array', bytes)
    this.size = bytes?.length ?? size!
    if (!isDiskSize(this.size)) {
      const name = bytes === undefined ? 'size' : 'the length of bytes'
      throw invalidArgument(name, `a multiple of ${SECTOR_SIZE} above 0`, this.size)
    }
    if (bytes !== undefined) this.#write(0, [bytes])
  }

  /** Bytes of memory that the disk takes. */
  get allocated(): number {
    return this.#chunks.size * CHUNK_SIZE
  }

  read(offset: number, buffers: readonly Uint8Array[]): Request {
    checkRange(this.size, offset, totalLength(buffers))
    return this.#requests.start(() => {
      forEachPart(offset, buffers, (index, start, part) => {
        const chunk = this.#chunks.get(index)
        if (chunk === undefined) part.fill(0)
        else part.set(chunk.subarray(start, start + part.length))
      })
      return undefined
    })
  }

  write(offset: number, buffers: readonly Uint8Array[]): Request {
    checkRange(this.size, offset, totalLength(buffers))
    return this.#requests.start(() => {
      this.#write(offset, buffers)
      return undefined
    })
  }

  flush(): Request {
    return this.#requests.start(() => undefined)
  }

  discard(offset: number, length: number): Request {
    return this.writeZeroes(offset, length)
  }

  writeZeroes(offset: number, length: number): Request {
    checkRange(this.size, offset, length)
    return this.#requests.start(() => {
      this.#clear(offset, offset + length)
      return undefined
    })
  }

  async close(): Promise<void> {
    await this.#requests.close()
    this.#chunks.clear()
  }

  #write(offset: number, buffers: readonly Uint8Array[]): void {
    forEachPart(offset, buffers, (index, start, part) => {
      let chunk = this.#chunks.get(index)
      if (chunk === undefined) {
        if (isZero(part)) return
        chunk = new Uint8Array(CHUNK_SIZE)
        this.#chunks.set(index, chunk)
      }
      chunk.set(part, start)
    })
  }

  #clear(offset: number, end: number): void {
    const first = Math.floor(offset / CHUNK_SIZE)
    const last = Math.ceil(end / CHUNK_SIZE)
    const clear = (index: number) => {
      const chunk = this.#chunks.get(index)
      if (chunk === undefined) return
      const base = index * CHUNK_SIZE
      chunk.fill(0, Math.max(offset - base, 0), Math.min(end - base, CHUNK_SIZE))
      if (isZero(chunk)) this.#chunks.delete(index)
    }
    // The guest may clear a disk that is far larger than what is in it.
    if (last - first <= this.#chunks.size) {
      for (let index = first; index < last; index++) clear(index)
    } else {
      for (const index of this.#chunks.keys()) if (index >= first && index < last) clear(index)
    }
  }
}

/** Takes buffers apart at the borders of chunks. `start` is an offset in the chunk. */
function forEachPart(
  offset: number,
  buffers: readonly Uint8Array[],
  visit: (index: number, start: number, part: Uint8Array) => void,
): void {
  let position = offset
  for (const buffer of buffers) {
    for (let done = 0; done < buffer.length; ) {
      const start = position % CHUNK_SIZE
      const part = buffer.subarray(done, done + CHUNK_SIZE - start)
      visit((position - start) / CHUNK_SIZE, start, part)
      done += part.length
      position += part.length
    }
  }
}
