import { read } from 'node:fs'
import type { PageRuns } from '../memory/guest-ram.js'
import { PAGE_SIZE } from '../memory/layout.js'
import type { MemoryImage } from '../memory/machine-ram.js'
import { failed } from './protocol.js'

/** Where pages of an image are that differ from its file. */
export class ImagePages {
  readonly #image: MemoryImage
  /** Of each run: pages in {@link MemoryImage.contents} before it. */
  readonly #before: Uint32Array

  constructor(image: MemoryImage) {
    this.#image = image
    const { changed } = image
    this.#before = new Uint32Array(changed.length / 2)
    let pages = 0
    for (let run = 0; run < this.#before.length; run++) {
      this.#before[run] = pages
      pages += changed[2 * run + 1]!
    }
  }

  /** Whether there are any. */
  get hasChanged(): boolean {
    return this.#before.length > 0
  }

  /** What is in some pages. */
  async read(first: number, count: number): Promise<Buffer> {
    const bytes = Buffer.allocUnsafe(count * PAGE_SIZE)
    if (!this.#hasAll(first, count)) await readAll(this.#image.fd, bytes, first * PAGE_SIZE)
    for (let run = this.#runAt(first); run < this.#before.length; run++) {
      const start = this.#image.changed[2 * run]!
      const from = Math.max(start, first)
      const end = Math.min(start + this.#image.changed[2 * run + 1]!, first + count)
      if (start >= first + count) break
      const at = (this.#before[run]! + from - start) * PAGE_SIZE
      bytes.set(this.#image.contents.subarray(at, at + (end - from) * PAGE_SIZE), (from - first) * PAGE_SIZE)
    }
    return bytes
  }

  /** What is in a page that differs from the file; undefined for the others. */
  changed(page: number): Uint8Array | undefined {
    const run = this.#runAt(page)
    if (run >= this.#before.length || this.#image.changed[2 * run]! > page) return undefined
    const at = (this.#before[run]! + page - this.#image.changed[2 * run]!) * PAGE_SIZE
    return this.#image.contents.subarray(at, at + PAGE_SIZE)
  }

  /** Whether nothing of the file is needed for these pages. */
  #hasAll(first: number, count: number): boolean {
    const run = this.#runAt(first)
    if (run >= this.#before.length) return false
    const { changed } = this.#image
    return changed[2 * run]! <= first && changed[2 * run]! + changed[2 * run + 1]! >= first + count
  }

  /** The first run that ends behind a page. */
  #runAt(page: number): number {
    const { changed } = this.#image
    let low = 0
    let high = this.#before.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if (changed[2 * middle]! + changed[2 * middle + 1]! <= page) low = middle + 1
      else high = middle
    }
    return low
  }
}

/**
 * Of pages that may have changed between two images, those that have. Where a machine's memory lies over a snapshot that
 * others use, all that it has ever written may have changed.
 */
export function withoutEqual(runs: PageRuns, before: ImagePages, after: ImagePages): PageRuns {
  if (!before.hasChanged) return runs
  const different: number[] = []
  for (let i = 0; i < runs.length; i += 2) {
    for (let page = runs[i]!; page < runs[i]! + runs[i + 1]!; page++) {
      const [old, now] = [before.changed(page), after.changed(page)]
      if (old !== undefined && now !== undefined && Buffer.compare(old, now) === 0) continue
      const last = different.length - 2
      if (last >= 0 && different[last]! + different[last + 1]! === page) different[last + 1]!++
      else different.push(page, 1)
    }
  }
  return Uint32Array.from(different)
}

async function readAll(fd: number, bytes: Buffer, position: number): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const count = await new Promise<number>((resolve, reject) => {
      read(fd, bytes, done, bytes.length - done, position + done, (error, count) =>
        error === null ? resolve(count) : reject(error),
      )
    })
    if (count === 0)
      throw failed(`Expected memory up to ${position + bytes.length} but its file ends at ${position + done}`)
    done += count
  }
}
