import type { Request } from './requests.js'

/** Bytes of the map that are loaded and saved together. */
export const MAP_PAGE_SIZE = 4096

/** Clusters that a page of the map is about. */
export const CLUSTERS_PER_PAGE = 8 * MAP_PAGE_SIZE

// Most pages are one of these two. They are shared, and so must not be changed.
const EMPTY_PAGE = new Uint8Array(MAP_PAGE_SIZE)
const FULL_PAGE = new Uint8Array(MAP_PAGE_SIZE).fill(0xff)

/** A page as it was at some moment. */
export interface SavedPage {
  readonly index: number
  readonly bytes: Uint8Array
}

/** Fills a page from where maps are kept. */
export type LoadPage = (index: number, bytes: Uint8Array) => Request

/**
 * Which clusters of an overlay are in the overlay: a bit for each, the first in bit 0 of byte 0. Once set a bit stays
 * set. Pages come into memory when they are needed first, and stay.
 */
export class ClusterMap {
  readonly #pages = new Map<number, Uint8Array>()
  readonly #loads = new Map<number, Promise<void>>()
  readonly #loadPage: LoadPage | undefined
  /** Pages with bits that are not saved. */
  #dirty = new Set<number>()

  /** @param loadPage - missing for a map that begins empty */
  constructor(loadPage?: LoadPage) {
    this.#loadPage = loadPage
  }

  /** Whether something was added since {@link takeChanged}. */
  get hasChanged(): boolean {
    return this.#dirty.size > 0
  }

  /** Whether {@link has} can tell of this cluster. */
  isLoaded(cluster: number): boolean {
    return this.#loadPage === undefined || this.#pages.has(Math.floor(cluster / CLUSTERS_PER_PAGE))
  }

  /** Makes the page with this cluster's bit known. A promise, if that takes time. */
  load(cluster: number): Request {
    if (this.#loadPage === undefined || this.isLoaded(cluster)) return undefined
    const index = Math.floor(cluster / CLUSTERS_PER_PAGE)
    const running = this.#loads.get(index)
    if (running !== undefined) return running
    const bytes = new Uint8Array(MAP_PAGE_SIZE)
    const request = this.#loadPage(index, bytes)
    if (request === undefined) {
      this.#keep(index, bytes)
      return undefined
    }
    const load = request.then(() => this.#keep(index, bytes)).finally(() => this.#loads.delete(index))
    this.#loads.set(index, load)
    return load
  }

  /** Whether the cluster is in the overlay. Its page has to be loaded. */
  has(cluster: number): boolean {
    const bit = cluster % CLUSTERS_PER_PAGE
    return ((this.#page(cluster)[bit >>> 3]! >>> (bit & 7)) & 1) === 1
  }

  /** Whether all clusters from `first` to `end` are known to be in the overlay. */
  hasAll(first: number, end: number): boolean {
    for (let cluster = first; cluster < end; cluster = this.runEnd(cluster, end)) {
      if (!this.isLoaded(cluster) || !this.has(cluster)) return false
    }
    return true
  }

  /** The end of the run of clusters from `first` on that are all in the overlay or all not: at most `end`, or the page's. */
  runEnd(first: number, end: number): number {
    const page = this.#page(first)
    const pageStart = first - (first % CLUSTERS_PER_PAGE)
    const last = Math.min(end - pageStart, CLUSTERS_PER_PAGE)
    const whole = this.has(first) ? 0xff : 0
    let bit = first - pageStart + 1
    while (bit < last) {
      const byte = page[bit >>> 3]!
      if ((bit & 7) === 0 && byte === whole) bit += 8
      else if (((byte >>> (bit & 7)) & 1) === (whole & 1)) bit += 1
      else break
    }
    return pageStart + Math.min(bit, last)
  }

  /** Clusters from `first` to `end` are in the overlay from now on. Pages have to be loaded, but for those within. */
  add(first: number, end: number): void {
    for (let cluster = first; cluster < end; ) {
      const index = Math.floor(cluster / CLUSTERS_PER_PAGE)
      const pageStart = index * CLUSTERS_PER_PAGE
      const stop = Math.min(end, pageStart + CLUSTERS_PER_PAGE)
      if (stop - cluster === CLUSTERS_PER_PAGE) this.#pages.set(index, FULL_PAGE)
      else this.#pages.set(index, withBits(this.#page(cluster), cluster - pageStart, stop - pageStart))
      this.#dirty.add(index)
      cluster = stop
    }
  }

  /** The pages that have changed since the last time, as they are now, in order. */
  takeChanged(): SavedPage[] {
    const indices = [...this.#dirty].sort((a, b) => a - b)
    this.#dirty = new Set()
    return indices.map((index) => {
      const bytes = this.#pages.get(index)!
      return { index, bytes: bytes === FULL_PAGE ? bytes : bytes.slice() }
    })
  }

  /** They could not be saved: the next {@link takeChanged} has them again. */
  putBack(pages: readonly SavedPage[]): void {
    for (const { index } of pages) this.#dirty.add(index)
  }

  #page(cluster: number): Uint8Array {
    return this.#pages.get(Math.floor(cluster / CLUSTERS_PER_PAGE)) ?? EMPTY_PAGE
  }

  #keep(index: number, bytes: Uint8Array): void {
    // All of it may have been added in the meantime.
    if (this.#pages.has(index)) return
    const shared = [EMPTY_PAGE, FULL_PAGE].find((page) => Buffer.compare(page, bytes) === 0)
    this.#pages.set(index, shared ?? bytes)
  }
}

/** The page with the bits from `first` to `end` set: in place, unless it is shared. */
function withBits(page: Uint8Array, first: number, end: number): Uint8Array {
  if (page === FULL_PAGE) return page
  const changed = page === EMPTY_PAGE ? page.slice() : page
  for (let bit = first; bit < end; ) {
    if ((bit & 7) === 0 && bit + 8 <= end) {
      changed[bit >>> 3] = 0xff
      bit += 8
    } else {
      changed[bit >>> 3]! |= 1 << (bit & 7)
      bit += 1
    }
  }
  return changed
}
